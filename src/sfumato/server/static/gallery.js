// The gallery: all images of the folder, the newest first, found by their words and models.
import { computed, effect, signal } from '@preact/signals';
import { useEffect, useRef } from 'preact/hooks';
import { removeImage } from './actions.js';
import { get, thumbOf } from './api.js';
import { Choice, IconButton, TextInput } from './fields.js';
import { html } from './html.js';
import { t } from './i18n.js';
import { happened } from './jobs.js';
import { painters } from './plan.js';
import { open, view } from './screen.js';

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
