// Below the picture: what it should show, the button that makes it, and what that takes.
import { useEffect, useRef } from 'preact/hooks';
import { generate } from './actions.js';
import { Icon } from './fields.js';
import { html, names } from './html.js';
import { duration, size, t } from './i18n.js';
import { model, plan } from './plan.js';
import { open, prefer, preferences } from './screen.js';
import { change, settings } from './settings.js';

/** How many tokens of how many; `over` where the model reads only the first ones. */
function Tokens({ name }) {
  const counts = plan.value?.tokens;
  const over = counts?.[name] > counts?.limit && settings.value.prompt_syntax === null;
  return html`<span class=${names('tokens', over && 'warn')} id="${name}-tokens">
    ${counts?.[name] > 0 && t(over ? 'tokens_over' : 'tokens', { n: counts[name], limit: counts.limit })}</span>`;
}

function Words({ name, label, placeholder }) {
  const ref = useRef();
  const value = settings.value[name];
  // Where the browser cannot size a field by its content, it is done here.
  useEffect(() => {
    if (CSS.supports('field-sizing', 'content')) return;
    ref.current.style.height = 'auto';
    ref.current.style.height = `${ref.current.scrollHeight}px`;
  }, [value]);
  return html`<div class="words">
    <label class="visually-hidden" for=${name}>${label}</label>
    <textarea ref=${ref} id=${name} dir="auto" rows="1" placeholder=${placeholder} value=${value} spellcheck=${false}
      aria-describedby="${name}-tokens"
      onInput=${(event) => change({ [name]: event.target.value })}></textarea>
    <${Tokens} name=${name} />
  </div>`;
}

function Plan() {
  const now = plan.value;
  if (!now) return html`<p class="plan"></p>`;
  if (!now.fits) return html`<p class="plan warn" lang="en" dir="auto"><${Icon} name="warning" />${now.message}</p>`;
  const text = t('fits', { needed: size(now.peak_bytes), free: size(now.free_bytes), time: duration(now.seconds) });
  return html`<p class="plan">${text}
    <button type="button" class="link" onClick=${() => open('plan')}>${t('why')}</button></p>`;
}

export function Dock() {
  const negative = preferences.value.negative;
  const submit = (event) => {
    event.preventDefault();
    generate();
  };
  return html`<form class="dock" onSubmit=${submit} aria-label=${t('prompt')}>
    <div class="writing">
      <${Words} name="prompt" label=${t('prompt')} placeholder=${t('prompt_hint')} />
      ${negative && html`<${Words} name="negative_prompt" label=${t('negative')} placeholder=${t('negative_hint')} />`}
    </div>
    <button type="submit" class="primary generate" disabled=${!model.value} aria-keyshortcuts="Control+Enter">
      <${Icon} name="sparkle" />${t('generate')}</button>
    <div class="dock-foot">
      <${Plan} />
      <button type="button" class="link" aria-expanded=${negative} onClick=${() => prefer({ negative: !negative })}>
        ${t('negative')}</button>
      <button type="button" class="link only-small" onClick=${() => open('settings')}>
        <${Icon} name="settings" />${t('settings')}</button>
    </div>
  </form>`;
}
