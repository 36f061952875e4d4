// Pictures that are dropped on the page or pasted: what they remember, or a place to start from.
import { signal } from '@preact/signals';
import { useEffect, useState } from 'preact/hooks';
import { beginWithFile, receive, useSettings } from './actions.js';
import { Dialog } from './dialogs.js';
import { Icon } from './fields.js';
import { html } from './html.js';
import { t } from './i18n.js';
import { close, dialog } from './screen.js';

const over = signal(false);

const pictureOf = (transfer) => [...(transfer?.files ?? [])].find(({ type }) => type.startsWith('image/'));

export function takeDrops() {
  const carries = (event) => event.dataTransfer?.types.includes('Files');
  addEventListener('dragover', (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    over.value = true;
  });
  addEventListener('dragleave', (event) => event.relatedTarget || (over.value = false));
  addEventListener('drop', (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    over.value = false;
    receive(pictureOf(event.dataTransfer) ?? event.dataTransfer.files[0]);
  });
  addEventListener('paste', (event) => {
    const file = pictureOf(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    receive(file);
  });
}

export const DropHint = () =>
  over.value && html`<div class="drop-hint"><p><${Icon} name="image" />${t('drop_here')}</p></div>`;

export function Dropped() {
  const { file, recipe } = dialog.value;
  const [url, setUrl] = useState(null);
  useEffect(() => {
    const made = URL.createObjectURL(file);
    setUrl(made);
    return () => URL.revokeObjectURL(made);
  }, [file]);
  const settings = () => {
    close();
    useSettings(recipe.request, recipe.fields?.Model);
  };
  const both = async () => {
    settings();
    await beginWithFile(file);
  };
  const { prompt } = recipe.request;
  return html`<${Dialog} title=${t('dropped')}>
    <div class="row dropped">${url && html`<img src=${url} alt=${file.name} />`}
      <div class="grow"><p class="quiet">${t('made_by', { name: recipe.program })}</p>
        <p class="said" dir="auto">${Array.isArray(prompt) ? prompt[0] : prompt}</p></div></div>
    ${recipe.notes.length > 0 && html`<ul class="notes" lang="en" dir="auto">
      ${recipe.notes.map((note) => html`<li key=${note}>${note}</li>`)}</ul>`}
    <footer class="dialog-foot">
      <button type="button" onClick=${both}>${t('both')}</button>
      <button type="button" onClick=${() => beginWithFile(file)}>${t('start_from_this')}</button>
      <button type="button" class="primary" autofocus onClick=${settings}>${t('use_settings')}</button>
    </footer>
  </${Dialog}>`;
}
