// The page: a bar, a picture with what it takes, and the gallery.
import { effect } from '@preact/signals';
import { render } from 'preact';
import { connected } from './api.js';
import { Help, Messages, PlanReasons, Preferences, Share, SettingsDialog } from './dialogs.js';
import { DropHint, Dropped, takeDrops } from './drop.js';
import { IconButton } from './fields.js';
import { Gallery, keepGallery } from './gallery.js';
import { Grid } from './grid.js';
import { html, names } from './html.js';
import { number, preferred, speak, t } from './i18n.js';
import { follow, live, running } from './jobs.js';
import { onKey } from './keys.js';
import { MaskDialog } from './mask.js';
import { Panel } from './panel.js';
import { keepPlanning, worker } from './plan.js';
import { Dock } from './prompt.js';
import { dialog, open, prefer, preferences, say, view } from './screen.js';
import { fromLink, replace, restoreDrafts } from './settings.js';
import { Film, Stage } from './stage.js';
import { Viewer } from './viewer.js';

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
