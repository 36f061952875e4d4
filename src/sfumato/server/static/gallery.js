// The gallery: all images of the folder, the newest first, found by their words and models.
import { computed, effect, signal } from '@preact/signals';
import { useEffect, useRef, useState } from 'preact/hooks';
import { beginWithImage, copy, removeImage, useSettings } from './actions.js';
import { Choice, Dialog, html, Icon, IconButton, TextInput } from './fields.js';
import { size, t, when } from './i18n.js';
import { fileOf, get, happened, painters, thumbOf } from './server.js';
import { close, dialog, open, start, view } from './state.js';

const PAGE = 60;
const PAUSE = 150;

const query = signal({ q: '', model: '' });
const found = signal({ images: [], cursor: null, total: null });
const narrowed = computed(() => Boolean(query.value.q || query.value.model));
let turn = 0;

async function fetchPage(cursor) {
  const mine = (turn += 1);
  const { q, model } = query.peek();
  const words = new URLSearchParams({ limit: PAGE, q, model: model ?? '', cursor: cursor ?? '' });
  const told = await get(`images?${words}`).catch(() => null);
  // What was asked for earlier and comes later is out of date.
  if (!told || mine !== turn) return;
  const before = cursor ? found.peek().images : [];
  found.value = { ...told, images: [...before, ...told.images] };
}

/** Keeps the list as the query and the folder have it, while the gallery is in sight. */
export function keepGallery() {
  let timer;
  effect(() => {
    query.value;
    clearTimeout(timer);
    if (view.value === 'gallery') timer = setTimeout(fetchPage, found.peek().total === null ? 0 : PAUSE);
  });
  effect(() => {
    const event = happened.value;
    const { images, total, ...rest } = found.peek();
    if (!event || total === null) return;
    const others = images.filter(({ key }) => key !== event.data.key);
    const fewer = total - (images.length - others.length);
    if (event.type === 'removed') found.value = { ...rest, images: others, total: fewer };
    else if (narrowed.peek()) fetchPage();
    else {
      const sorted = [event.data, ...others].sort((a, b) => b.created - a.created);
      found.value = { ...rest, images: sorted, total: fewer + 1 };
    }
  });
}

/** Asks for the next page when the end of the list comes into sight. */
function More() {
  const ref = useRef();
  const { cursor } = found.value;
  useEffect(() => {
    const look = ([entry]) => entry.isIntersecting && fetchPage(cursor);
    const watch = new IntersectionObserver(look, { rootMargin: '600px' });
    watch.observe(ref.current);
    return () => watch.disconnect();
  }, [cursor]);
  return html`<button type="button" ref=${ref} onClick=${() => fetchPage(cursor)}>${t('more')}</button>`;
}

const Tile = ({ image, keys }) => {
  const text = image.prompt || image.name;
  return html`<li style=${{ '--ratio': image.width / image.height }}>
    <button type="button" class="tile" aria-label=${text} onClick=${() => open('viewer', { keys, key: image.key })}>
      <img src=${thumbOf(image.key)} alt="" loading="lazy" width=${image.width} height=${image.height} />
      <span class="tile-text" dir="auto" aria-hidden="true">${text}</span></button>
    <${IconButton} icon="trash" class="tile-delete" label=${t('delete_named', { name: text })}
      onClick=${() => removeImage(image.key)} />
  </li>`;
};

export function Gallery() {
  const { images, cursor, total } = found.value;
  const keys = images.map(({ key }) => key);
  const used = painters.value.map(({ name }) => [name, name, true]);
  const { q, model } = query.value;
  return html`<section class="gallery" aria-label=${t('gallery')}>
    <div class="search" role="search">
      <${TextInput} type="search" label=${t('search')} value=${q} placeholder=${t('search_hint')}
        onInput=${(text) => (query.value = { ...query.peek(), q: text })} />
      <${Choice} label=${t('model')} value=${model} options=${[['', t('all_models')], ...used]}
        onChange=${(name) => (query.value = { ...query.peek(), model: name ?? '' })} />
      <p class="quiet" role="status">${total !== null && t('images', { n: total })}</p>
    </div>
    ${total === 0 && html`<p class="note">${t(narrowed.value ? 'nothing_found' : 'gallery_empty')}</p>`}
    <ul class="tiles">${images.map((image) => html`<${Tile} key=${image.key} image=${image} keys=${keys} />`)}</ul>
    ${cursor && html`<${More} />`}
  </section>`;
}

// One picture, large: how it came to be, beside another one, and what can be done with it.

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
