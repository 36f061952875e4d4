// One picture, large: how it came to be, beside another one, and what can be done with it.
import { useEffect, useState } from 'preact/hooks';
import { beginWithImage, copy, removeImage, useSettings } from './actions.js';
import { fileOf, get } from './api.js';
import { Dialog } from './dialogs.js';
import { Choice, Icon, IconButton } from './fields.js';
import { html } from './html.js';
import { size, t, when } from './i18n.js';
import { close, dialog } from './screen.js';
import { start } from './settings.js';

/** Details of an image by its key; null while they come, and for one that is gone. */
function useDetails(key) {
  const [details, setDetails] = useState(null);
  useEffect(() => {
    let here = true;
    setDetails(null);
    get(`images/${key}`).then((told) => here && setDetails(told), () => here && close());
    return () => (here = false);
  }, [key]);
  return details;
}

function Recipe({ details }) {
  const request = details.request ?? {};
  const text = (name) => (request[name] == null ? '' : String(request[name]));
  const rows = [
    ['model', details.model], ['seed', details.seed], ['steps', text('steps')], ['guidance', text('guidance_scale')],
    ['scheduler', details.scheduler], ['size', `${details.width} × ${details.height}`],
    ['strength', request.image ? text('strength') : ''], ['program', details.program],
    ['created', when(details.created)], ['file', `${details.name} (${size(details.bytes)})`],
  ].filter(([, value]) => value);
  return html`
    <p class="said" dir="auto">${details.prompt || t('untitled')}</p>
    ${details.negative_prompt && html`<p class="quiet" dir="auto">${t('negative')}: ${details.negative_prompt}</p>`}
    <dl>${rows.map(([name, value]) => html`<div key=${name}>
      <dt>${t(name)}</dt><dd dir="auto">${value}</dd></div>`)}</dl>
    ${details.notes?.length > 0 && html`<ul class="notes" lang="en" dir="auto">
      ${details.notes.map((note) => html`<li key=${note}>${note}</li>`)}</ul>`}`;
}

function Actions({ details, onDelete }) {
  const { key, request, prompt, model } = details;
  const use = () => {
    close();
    useSettings({ ...request, seed: Number(details.seed) || request.seed }, model);
  };
  return html`<div class="actions">
    ${request && html`<button type="button" class="primary" onClick=${use}>${t('use_settings')}</button>`}
    <button type="button" onClick=${() => beginWithImage(key, prompt)}>${t('start_from_this')}</button>
    <span class="row">
      ${request && html`<${IconButton} icon="copy" label=${t('copy_recipe')}
        onClick=${() => copy(JSON.stringify(request, null, 2))} />`}
      <a class="icon-button" href="${fileOf(key)}?download=1" download aria-label=${t('download')}
        title=${t('download')}><${Icon} name="down" /></a>
      <${IconButton} icon="trash" label=${t('delete')} onClick=${onDelete} />
    </span>
  </div>`;
}

/** `before` shows left of the slider (right of it in languages that are read from the right), `after` beyond it. */
function Compare({ before, after }) {
  const [share, setShare] = useState(50);
  return html`<div class="compare" style=${{ '--share': `${share}%` }}>
    <img src=${after.url} alt=${after.alt} />
    <img src=${before.url} alt=${before.alt} class="before" />
    <input type="range" min="0" max="100" value=${share} aria-label=${t('compare')}
      onInput=${(event) => setShare(Number(event.target.value))} />
  </div>`;
}

/** What the picture may be compared with: its neighbours in the list, and the picture that was started from. */
function others(keys, at) {
  const found = { newer: keys[at - 1] && fileOf(keys[at - 1]), older: keys[at + 1] && fileOf(keys[at + 1]),
    start_image: start.value?.url };
  return Object.entries(found).filter(([, url]) => url);
}

export function Viewer() {
  const { keys: given, key: first } = dialog.value;
  const [keys, setKeys] = useState(given);
  const [key, setKey] = useState(first);
  const [beside, setBeside] = useState(null);
  const details = useDetails(key);
  const at = keys.indexOf(key);
  const go = (way) => keys[at + way] && setKey(keys[at + way]);
  const onKeyDown = (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way || event.target.matches('input, select')) return;
    go(document.documentElement.dir === 'rtl' ? -way : way);
  };
  const onDelete = () => {
    const rest = keys.filter((one) => one !== key);
    removeImage(key);
    if (!rest.length) return close();
    setKeys(rest);
    setKey(rest[Math.min(at, rest.length - 1)]);
  };
  const choices = others(keys, at);
  const other = choices.find(([name]) => name === beside)?.[1];
  const alt = details?.prompt || t('untitled');
  return html`<${Dialog} title=${t('picture')} wide onKeyDown=${onKeyDown}>
    <div class="viewer">
      <div class="view">
        ${other
          ? html`<${Compare} before=${{ url: other, alt: t(beside) }} after=${{ url: fileOf(key), alt }} />`
          : html`<img src=${fileOf(key)} alt=${alt} />`}
        <${IconButton} icon="previous" class="previous" label=${t('newer')} disabled=${at <= 0}
          onClick=${() => go(-1)} />
        <${IconButton} icon="next" class="next" label=${t('older')} disabled=${at < 0 || at >= keys.length - 1}
          onClick=${() => go(1)} />
      </div>
      <div class="about">
        ${details && html`<${Recipe} details=${details} />`}
        ${choices.length > 0 && html`<${Choice} label=${t('compare_with')} value=${other ? beside : null}
          options=${[['', t('nothing')], ...choices.map(([name]) => [name, t(name)])]} onChange=${setBeside} />`}
        ${details && html`<${Actions} details=${details} onDelete=${onDelete} />`}
      </div>
    </div>
  </${Dialog}>`;
}
