// The work. Below the picture: what it should show, the button that makes it, and what that takes.
import { useEffect, useRef } from 'preact/hooks';
import { beginWithImage, cancel, generate, removeImage, sendAgain } from './actions.js';
import { html, Icon, IconButton, names } from './fields.js';
import { duration, size, t } from './i18n.js';
import { fileOf, frames, live, missing, model, onStage, picked, plan, queued, thumbOf } from './server.js';
import { change, open, prefer, preferences, settings } from './state.js';

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

// The picture: the one being drawn, with what is left to do, or one that is there; below it the filmstrip.

const promptOf = ({ request }) => (Array.isArray(request.prompt) ? request.prompt[0] : request.prompt) ?? '';
export const altOf = (job) => promptOf(job) || t('untitled');

/** The place of a picture on the stage, as large as fits. */
const shape = ({ width, height }) => ({ '--ratio': width && height ? width / height : 1 });

// For models that know few words, and those in English.
const EXAMPLES = [
  'a red apple, 3d', 'a penguin on a light blue background, cartoon', 'a small fox on a striped green background',
  'three stars on a dark blue background, flat style', 'a rocket above a house, flat style',
];

function Welcome() {
  const few = model.value?.words.length > 0;
  return html`<div class="welcome">
    <h2>${t('welcome')}</h2>
    <p>${t(few ? 'welcome_examples' : 'welcome_hint')}</p>
    ${few && html`<div class="chips">${EXAMPLES.map((text) => html`<button type="button" key=${text} lang="en"
      dir="auto" onClick=${() => change({ prompt: text })}>${text}</button>`)}</div>`}
  </div>`;
}

function Drawing({ job }) {
  const now = live.value.get(job.id) ?? {};
  const share = now.total ? now.step / now.total : 0;
  const several = job.request.count > 1;
  const step = now.total ? t('step_of', { n: now.step, total: now.total }) : t('starting');
  const texts = [
    several && now.place !== undefined && t('image_of', { n: now.place + 1, count: job.request.count }),
    now.stage === 'loading' ? t('loading') : step,
    now.seconds_left != null && t('time_left', { time: duration(now.seconds_left) }),
  ];
  return html`<figure class="picture drawing" style=${{ ...shape(job.request), '--blur': `${(1 - share) * 12}px` }}>
    <div class="canvas">${now.preview
      ? html`<img src=${now.preview} alt=${t('preview_of', { prompt: altOf(job) })} />`
      : html`<div class="mist"></div>`}</div>
    <figcaption class="caption">
      <progress value=${now.total ? share : undefined} max="1" aria-label=${t('progress')}></progress>
      <span class="grow">${texts.filter(Boolean).join(' · ')}</span>
      <button type="button" onClick=${() => cancel(job.id)}>${t('cancel')}</button>
    </figcaption>
  </figure>`;
}

const Queued = ({ job }) => html`<div class="note">
  <${Icon} name="clock" />
  <p>${job.position ? t('queued', { n: job.position }) : t('queued_next')}</p>
  <p class="quiet">${promptOf(job)}</p>
  <button type="button" onClick=${() => cancel(job.id)}>${t('cancel')}</button>
</div>`;

const Failed = ({ job }) => html`<div class="note failed">
  <${Icon} name="warning" />
  <p dir="auto" lang="en">${job.error?.message}</p>
  <p class="quiet">${promptOf(job)}</p>
  <button type="button" onClick=${() => sendAgain(job)}>${t('try_again')}</button>
</div>`;

function Finished({ job, image }) {
  const look = () => open('viewer', { keys: frames.peek().map(({ key }) => key).filter(Boolean), key: image });
  const seed = job.request.seed + job.images.indexOf(image);
  return html`<figure class="picture" style=${shape(job.request)}>
    <button type="button" class="canvas" aria-label=${t('look', { prompt: altOf(job) })} onClick=${look}>
      <img src=${fileOf(image)} alt=${altOf(job)} onError=${() => missing(image)} /></button>
    <figcaption class="caption">
      <span class="grow quiet ellipsis" dir="auto" title="${t('seed')} ${seed}">${promptOf(job)}</span>
      <${IconButton} icon="image" label=${t('start_from_this')} onClick=${() => beginWithImage(image, promptOf(job))} />
      <a class="icon-button" href="${fileOf(image)}?download=1" download aria-label=${t('download')}
        title=${t('download')}><${Icon} name="down" /></a>
      <${IconButton} icon="trash" label=${t('delete')} onClick=${() => removeImage(image)} />
      <${IconButton} icon="info" label=${t('details')} onClick=${look} />
    </figcaption>
    ${job.notes.length > 0 && html`<ul class="notes" lang="en" dir="auto">
      ${job.notes.map((note) => html`<li key=${note}>${note}</li>`)}</ul>`}
  </figure>`;
}

export function Stage() {
  const frame = onStage.value;
  const kind = frame && (frame.key ? 'done' : frame.job.state);
  return html`<section class=${names('stage', kind)} aria-label=${t('picture')} aria-busy=${kind === 'running'}>
    ${!frame && html`<${Welcome} />`}
    ${kind === 'done' && html`<${Finished} key=${frame.key} job=${frame.job} image=${frame.key} />`}
    ${kind === 'running' && html`<${Drawing} job=${frame.job} />`}
    ${kind === 'queued' && html`<${Queued} job=${frame.job} />`}
    ${kind === 'failed' && html`<${Failed} job=${frame.job} />`}
    ${queued.value > 0 && kind !== 'queued' && html`<p class="waiting">${t('waiting', { n: queued.value })}</p>`}
  </section>`;
}

function Frame({ frame }) {
  const { id, job, key } = frame;
  const now = live.value.get(job.id);
  const share = now?.total ? now.step / now.total : 0;
  const state = key ? '' : `${t(`state_${job.state}`)}: `;
  const current = onStage.value?.id === id;
  return html`<li><button type="button" class=${names('frame', !key && job.state)} aria-label="${state}${altOf(job)}"
    aria-current=${current ? 'true' : undefined} onClick=${() => (picked.value = id)}>
    ${key && html`<img src=${thumbOf(key)} alt="" loading="lazy" onError=${() => missing(key)} />`}
    ${!key && now?.preview && html`<img src=${now.preview} alt="" />`}
    ${!key && job.state === 'queued' && html`<${Icon} name="clock" />`}
    ${!key && job.state === 'failed' && html`<${Icon} name="warning" />`}
    ${!key && job.state === 'running' && html`<span class="bar" style=${{ '--share': share }}></span>`}
  </button></li>`;
}

/** Arrow keys go along the strip, too. */
function along(event) {
  const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!way) return;
  const forward = document.documentElement.dir === 'rtl' ? -way : way;
  const item = event.target.closest('li');
  const next = forward > 0 ? item?.nextElementSibling : item?.previousElementSibling;
  if (!next) return;
  event.preventDefault();
  next.firstElementChild.focus();
  next.firstElementChild.click();
}

/** What this studio made lately and is about to make, the newest first. */
export const Film = () => frames.value.length > 0 && html`
<ol class="film" aria-label=${t('filmstrip')} onKeyDown=${along}>
  ${frames.value.map((frame) => html`<${Frame} key=${frame.id} frame=${frame} />`)}
</ol>`;
