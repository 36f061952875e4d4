// The frame of a dialog, messages at the edge, and the small dialogs: shortcuts, a link to share.
import { useLayoutEffect, useRef } from 'preact/hooks';
import { Check, Choice, IconButton } from './fields.js';
import { html, names } from './html.js';
import { LANGUAGES, choose, language, t } from './i18n.js';
import { SHORTCUTS } from './keys.js';
import { Panel } from './panel.js';
import { plan } from './plan.js';
import { announcement, close, dismiss, messages, prefer, preferences } from './screen.js';
import { link } from './settings.js';

/** A modal dialog: the browser keeps the focus inside, closes it on Escape, and gives the focus back. */
export function Dialog({ title, wide, children, onClose = close, ...rest }) {
  const ref = useRef();
  // At once, not after the next frame: a key pressed meanwhile is meant for the dialog.
  useLayoutEffect(() => {
    const before = document.activeElement;
    ref.current.showModal();
    return () => before?.isConnected && before.focus();
  }, []);
  return html`<dialog ref=${ref} class=${names(wide && 'wide')} aria-label=${title} closedby="any"
    onClose=${onClose} ...${rest}>
    <header class="dialog-head"><h2>${title}</h2>
      <${IconButton} icon="close" label=${t('close')} onClick=${() => ref.current.close()} /></header>
    ${children}
  </dialog>`;
}

export const Messages = () => html`
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

export const Help = () => html`<${Dialog} title=${t('shortcuts')}>
  <table class="plain">
    ${SHORTCUTS.map(({ keys, label }) => html`<tr key=${label}>
      <th scope="row">${t(label)}</th><td dir="ltr"><${Keys} keys=${keys} /></td></tr>`)}
  </table>
  <${Check} label=${t('letters')} checked=${preferences.value.letters}
    onChange=${(letters) => prefer({ letters })} />
  <p class="hint">${t('letters_hint')}</p>
</${Dialog}>`;

export function Share() {
  const address = link();
  const select = (element) => element?.select();
  return html`<${Dialog} title=${t('share')}>
    <p>${t('share_hint')}</p>
    <input type="text" readonly value=${address} aria-label=${t('share')} ref=${select} />
  </${Dialog}>`;
}

const THEMES = ['system', 'light', 'dark'];

export const Preferences = () => html`<${Dialog} title=${t('preferences')}>
  <${Choice} label=${t('language')} value=${language.value}
    options=${Object.entries(LANGUAGES).map(([code, name]) => [code, name, true])} onChange=${choose} />
  <${Choice} label=${t('theme')} value=${preferences.value.theme}
    options=${THEMES.map((name) => [name, t(`theme_${name}`)])} onChange=${(theme) => prefer({ theme })} />
</${Dialog}>`;

/** The settings where there is no room for them beside the picture. */
export const SettingsDialog = () => html`<${Dialog} title=${t('settings')} class="sheet"><${Panel} /></${Dialog}>`;

export const PlanReasons = () => html`<${Dialog} title=${t('plan')}>
  <ul class="reasons" lang="en" dir="auto">
    ${(plan.value?.reasons ?? []).map((reason) => html`<li key=${reason}>${reason}</li>`)}</ul>
</${Dialog}>`;
