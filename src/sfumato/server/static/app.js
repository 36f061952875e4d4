// The page: its bar, views and small dialogs, what is dropped on it, and the keyboard.
import { effect, signal } from '@preact/signals';
import { render } from 'preact';
import { useEffect, useState } from 'preact/hooks';
import { beginWithFile, cancelCurrent, generate, receive, removeShown, showNext, useSettings } from './actions.js';
import { Check, Choice, Dialog, html, Icon, IconButton, names } from './fields.js';
import { Gallery, keepGallery, Viewer } from './gallery.js';
import { choose, language, LANGUAGES, number, preferred, speak, t } from './i18n.js';
import { Panel } from './panel.js';
import { connected, follow, keepPlanning, live, plan, running, worker } from './server.js';
import {
  announcement, close, dialog, dismiss, fromLink, link, messages, open, prefer, preferences, redo, replace,
  restoreDrafts, say, undo, view,
} from './state.js';
import { Grid, MaskDialog } from './tools.js';
import { Dock, Film, Stage } from './work.js';

const focusPrompt = () => {
  view.value = 'create';
  requestAnimationFrame(() => document.getElementById('prompt')?.focus());
};

// The keyboard. Letters alone can be switched off (WCAG 2.1.4) and never act while somebody types.
const SHORTCUTS = [
  { keys: ['ctrl', 'enter'], label: 'generate', run: generate },
  { keys: ['escape'], label: 'cancel_run', run: cancelCurrent },
  { keys: ['ctrl', 'z'], label: 'undo_settings', run: undo },
  { keys: ['ctrl', 'shift', 'z'], label: 'redo_settings', run: redo },
  { keys: ['p'], label: 'go_prompt', run: focusPrompt },
  { keys: ['c'], label: 'go_create', run: () => (view.value = 'create') },
  { keys: ['g'], label: 'go_gallery', run: () => (view.value = 'gallery') },
  { keys: ['j'], label: 'older', run: () => showNext(1) },
  { keys: ['k'], label: 'newer', run: () => showNext(-1) },
  { keys: ['delete'], label: 'delete', run: removeShown },
  { keys: ['s'], label: 'toggle_panel', run: () => prefer({ panel: !preferences.peek().panel }) },
  { keys: ['?'], label: 'shortcuts', run: () => open('help') },
];

const TYPING = 'textarea, select, input:not([type=range], [type=checkbox], [type=button])';
const typing = (element) => element.matches?.(TYPING);

function matches({ keys }, event) {
  const command = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (keys.includes('ctrl') !== command || event.altKey) return false;
  // "?" is typed with Shift on many keyboards; only combinations with Ctrl ask for it.
  if (command && keys.includes('shift') !== event.shiftKey) return false;
  return keys.at(-1) === key;
}

/** Acts on a key; `true` if it was one of ours. */
function onKey(event) {
  if (event.defaultPrevented || event.isComposing || dialog.peek()) return;
  const found = SHORTCUTS.find((one) => matches(one, event));
  if (!found) return;
  const single = found.keys.length === 1;
  if (typing(event.target) && found.label !== 'generate' && found.label !== 'cancel_run') return;
  if (single && found.keys[0] !== 'escape' && !preferences.peek().letters) return;
  event.preventDefault();
  found.run();
}

// Messages at the edge, and the small dialogs: shortcuts, a link to share.

const Messages = () => html`
  <div class="messages">
    ${messages.value.map((one) => html`<div key=${one.id} class=${names('message', one.kind)}
      role=${one.kind === 'error' ? 'alert' : 'status'}>
      <span>${one.text}</span>
      ${one.action && html`<button type="button" class="link" onClick=${() => {
        one.action.run();
        dismiss(one.id);
      }}>${one.action.label}</button>`}
      <${IconButton} icon="close" class="tiny" label=${t('close')} onClick=${() => dismiss(one.id)} />
    </div>`)}
  </div>
  <p class="visually-hidden" role="status">${announcement.value}</p>`;

const NAMED = ['ctrl', 'shift', 'enter', 'escape', 'delete'];
const Key = ({ name }) =>
  NAMED.includes(name) ? html`<kbd>${t(`key_${name}`)}</kbd>`
    : html`<kbd translate=${false}>${name.toUpperCase()}</kbd>`;
const Keys = ({ keys }) => keys.map((name, place) => html`${place > 0 && ' + '}<${Key} name=${name} />`);

const Help = () => html`<${Dialog} title=${t('shortcuts')}>
  <table class="plain">
    ${SHORTCUTS.map(({ keys, label }) => html`<tr key=${label}>
      <th scope="row">${t(label)}</th><td dir="ltr"><${Keys} keys=${keys} /></td></tr>`)}
  </table>
  <${Check} label=${t('letters')} checked=${preferences.value.letters}
    onChange=${(letters) => prefer({ letters })} />
  <p class="hint">${t('letters_hint')}</p>
</${Dialog}>`;

function Share() {
  const address = link();
  const select = (element) => element?.select();
  return html`<${Dialog} title=${t('share')}>
    <p>${t('share_hint')}</p>
    <input type="text" readonly value=${address} aria-label=${t('share')} ref=${select} />
  </${Dialog}>`;
}

const THEMES = ['system', 'light', 'dark'];

const Preferences = () => html`<${Dialog} title=${t('preferences')}>
  <${Choice} label=${t('language')} value=${language.value}
    options=${Object.entries(LANGUAGES).map(([code, name]) => [code, name, true])} onChange=${choose} />
  <${Choice} label=${t('theme')} value=${preferences.value.theme}
    options=${THEMES.map((name) => [name, t(`theme_${name}`)])} onChange=${(theme) => prefer({ theme })} />
</${Dialog}>`;

/** The settings where there is no room for them beside the picture. */
const SettingsDialog = () => html`<${Dialog} title=${t('settings')} class="sheet"><${Panel} /></${Dialog}>`;

const PlanReasons = () => html`<${Dialog} title=${t('plan')}>
  <ul class="reasons" lang="en" dir="auto">
    ${(plan.value?.reasons ?? []).map((reason) => html`<li key=${reason}>${reason}</li>`)}</ul>
</${Dialog}>`;

// Pictures that are dropped on the page or pasted: what they remember, or a place to start from.

const over = signal(false);

const pictureOf = (transfer) => [...(transfer?.files ?? [])].find(({ type }) => type.startsWith('image/'));

function takeDrops() {
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

const DropHint = () =>
  over.value && html`<div class="drop-hint"><p><${Icon} name="image" />${t('drop_here')}</p></div>`;

function Dropped() {
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

// A bar, a picture with what it takes, and the gallery.

const DIALOGS = {
  dropped: Dropped, grid: Grid, help: Help, mask: MaskDialog, plan: PlanReasons, preferences: Preferences,
  settings: SettingsDialog, share: Share, viewer: Viewer,
};

const Tab = ({ name }) => html`<button type="button" aria-current=${view.value === name ? 'page' : undefined}
  onClick=${() => (view.value = name)}>${t(name)}</button>`;

function State() {
  if (!connected.value) return html`<span class="warn">${t('offline')}</span>`;
  const { state, device } = worker.value;
  if (state === 'ready') return html`<span class="ready" translate=${false}>${device}</span>`;
  return html`<span class=${names(state === 'broken' && 'warn')}>${t(`worker_${state}`)}</span>`;
}

const Bar = () => html`<header class="bar">
  <h1 translate=${false}>Sfumato</h1>
  <nav aria-label=${t('views')}><${Tab} name="create" /><${Tab} name="gallery" /></nav>
  <span class="grow" role="status"><${State} /></span>
  <${IconButton} icon="help" label=${t('shortcuts')} onClick=${() => open('help')} />
  <${IconButton} icon="theme" label=${t('preferences')} onClick=${() => open('preferences')} />
  ${view.value === 'create' && html`<${IconButton} icon="panel" class="only-large" label=${t('toggle_panel')}
    pressed=${preferences.value.panel} onClick=${() => prefer({ panel: !preferences.value.panel })} />`}
</header>`;

function App() {
  const Shown = DIALOGS[dialog.value?.name];
  const side = preferences.value.panel && view.value === 'create';
  return html`
    <${Bar} />
    <main class=${names(view.value, side && 'with-panel')}>
      ${view.value === 'create'
        ? html`<div class="work"><${Stage} /><${Film} /><${Dock} /></div>`
        : html`<${Gallery} />`}
      ${side && html`<aside class="panel only-large" aria-label=${t('settings')}><${Panel} /></aside>`}
    </main>
    <${DropHint} />
    ${Shown && html`<${Shown} key=${dialog.value.name} />`}
    <${Messages} />`;
}

function takeLink() {
  const found = fromLink(location.hash);
  if (!found) return;
  history.replaceState(null, '', location.pathname);
  replace(found);
  say(t('link_used'));
}

async function begin() {
  await speak(preferred());
  takeLink();
  restoreDrafts();
  effect(() => document.documentElement.setAttribute('data-theme', preferences.value.theme));
  effect(() => {
    const now = running.value && live.value.get(running.value.id);
    document.title = now?.total ? `${number(now.step / now.total, { style: 'percent' })} · Sfumato` : 'Sfumato';
  });
  takeDrops();
  keepGallery();
  keepPlanning();
  follow();
  addEventListener('keydown', onKey);
  addEventListener('hashchange', takeLink);
  render(html`<${App} />`, document.getElementById('app'));
}

begin();
