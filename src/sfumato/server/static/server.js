// The server's native API; its words are in server/native.py.
import { computed, effect, signal } from '@preact/signals';
import { number, t } from './i18n.js';
import { announcement, mask, settings, start, steering, usualStrength } from './state.js';

/** Whether events arrive; false while the server cannot be reached. */
export const connected = signal(true);

/** What the server refuses, as one sentence. */
export class Refused extends Error {
  constructor(status, { message, code } = {}) {
    super(message ?? String(status));
    Object.assign(this, { status, code });
  }
}

async function call(method, path, body, type = 'application/json') {
  const headers = body === undefined ? {} : { 'Content-Type': type };
  const answer = await fetch(`/api/${path}`, {
    method, headers, body: body === undefined || body instanceof Blob ? body : JSON.stringify(body),
  });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused(answer.status, told.error);
  return told;
}

export const get = (path) => call('GET', path);
export const post = (path, body = {}) => call('POST', path, body);
export const remove = (path) => call('DELETE', path);
export const recipeOf = (file) => call('POST', 'recipe', file, file.type);

export const fileOf = (key) => `/api/images/${key}/file`;
export const thumbOf = (key) => `/api/images/${key}/thumb`;

const AGAIN = 2000;

/** Hands each event to `on[type](data)`. Comes back by itself, and misses nothing that the server keeps. */
export function listen(on) {
  let last = '';
  const connect = () => {
    const source = new EventSource(`/api/events${last && `?last=${last}`}`);
    source.onopen = () => (connected.value = true);
    source.onerror = () => {
      connected.value = false;
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, AGAIN);
    };
    for (const type of Object.keys(on)) {
      source.addEventListener(type, (event) => {
        last = event.lastEventId || last;
        on[type](JSON.parse(event.data));
      });
    }
  };
  connect();
}

// What the server has: models, schedulers, the worker; and what the settings would take on it.

const PAUSE = 250;

export const worker = signal({ state: 'starting' });
export const abilities = signal({ mask: false });
export const models = signal([]);
export const samplers = signal([]);
export const spacings = signal([]);
export const preprocessors = signal([]);
const fallback = signal(null);

export const painters = computed(() => models.value.filter(({ kind }) => kind === 'checkpoint' || kind === 'core-ml'));
/** The chosen model, or the default one where none is chosen or the chosen one is not there any more. */
export const model = computed(() => {
  const named = (name) => painters.value.find((one) => one.name === name);
  return named(settings.value.model) ?? named(fallback.value) ?? painters.value[0] ?? null;
});

export async function loadModels(look = false) {
  const told = await get(`models${look ? '?look=true' : ''}`);
  fallback.value = told.default;
  models.value = told.models;
}

export async function loadFacts() {
  const [health, known] = await Promise.all([get('health'), get('samplers'), loadModels()]);
  worker.value = health.worker;
  abilities.value = { mask: Boolean(health.mask) };
  samplers.value = known.samplers;
  spacings.value = known.spacings;
  preprocessors.value = known.preprocessors;
}

const PASSED_ON = ['steps', 'guidance_scale', 'scheduler', 'spacing', 'seed', 'width', 'height'];

/** The settings as the server wants them: {model, request, compute_unit?}. What has its default is absent. */
export function asked(value = settings.peek(), picture = start.peek(), painted = mask.peek()) {
  const request = { prompt: value.prompt, count: value.count, ...value.extra };
  if (value.negative_prompt) request.negative_prompt = value.negative_prompt;
  if (value.draft) request.draft = true;
  if (value.prompt_syntax) request.prompt_syntax = value.prompt_syntax;
  for (const name of PASSED_ON) if (value[name] != null) request[name] = value[name];
  for (const name of ['adapters', 'embeddings']) if (value[name].length) request[name] = value[name];
  const seen = value.controls.filter((one) => steering.peek()[one.model]);
  const controls = seen.map((one) => ({ ...one, image: steering.peek()[one.model].url }));
  if (controls.length) request.controls = [...(request.controls ?? []), ...controls];
  if (picture) request.image = picture.key ?? picture.url;
  if (picture && abilities.peek().mask && (painted || value.extend)) {
    request.mask = { ...(painted && { file: painted.url, edge: painted.edge }), extend: value.extend ?? undefined };
  }
  if (request.image) request.strength = value.strength ?? usualStrength();
  const unit = model.peek()?.compute_units?.includes(value.compute_unit) ? { compute_unit: value.compute_unit } : {};
  return { model: model.peek()?.name, request, ...unit };
}

/** PLAN for the settings, or {fits: false, message}; null until the worker is there. */
export const plan = signal(null);

/** Plans anew whenever the settings have stayed the same for a moment. */
export function keepPlanning() {
  let timer;
  let newest = 0;
  const ask = async () => {
    const turn = (newest += 1);
    let told;
    try {
      const { compute_unit, ...planned } = asked();
      told = await post('plan', planned);
    } catch (refused) {
      if (refused.status === 503 || !refused.status) {
        timer = setTimeout(ask, AGAIN);
        return;
      }
      told = { fits: false, message: refused.message };
    }
    if (turn !== newest) return;
    plan.value = told;
    // Tokens are counted by the model, which may still be on its way.
    if (told.tokens === null) timer = setTimeout(ask, AGAIN);
  };
  effect(() => {
    const now = [model.value, settings.value, start.value, mask.value, steering.value, worker.value.state];
    clearTimeout(timer);
    if (now[0]) timer = setTimeout(ask, PAUSE);
  });
}

// Jobs and images as the server tells of them, and which one is on the stage.

const MOST = 60;

/** Jobs by id, and of those that are being drawn the latest progress. */
export const jobs = signal(new Map());
export const live = signal(new Map());
/** Keys of images that are not in the folder any more. */
export const gone = signal(new Set());
const heard = new Map();
/** What the user picked: {job, key}; null follows what is being drawn. */
export const picked = signal(null);
/** The latest event about images, {type, data}, for whoever lists them. */
export const happened = signal(null);

const ended = ({ state }) => state !== 'queued' && state !== 'running';
const newestFirst = computed(() =>
  [...jobs.value.values()].sort((a, b) => b.created - a.created || (a.id < b.id ? 1 : -1)));

/** What the filmstrip shows, the newest first: {id, job, key?}, an image each or a job that has none yet. */
export const frames = computed(() =>
  newestFirst.value.flatMap((job) => {
    const images = job.images.filter((key) => !gone.value.has(key));
    const shown = images.map((key) => ({ id: key, job, key })).reverse();
    if (job.state === 'cancelled' || (ended(job) && shown.length && job.state === 'done')) return shown;
    return ended(job) && job.state === 'done' ? shown : [{ id: job.id, job }, ...shown];
  }));

export const running = computed(() => newestFirst.value.find(({ state }) => state === 'running') ?? null);
export const queued = computed(() => newestFirst.value.filter(({ state }) => state === 'queued').length);

/** The frame on the stage. */
export const onStage = computed(() => {
  const wanted = picked.value;
  const found = wanted && frames.value.find(({ id }) => id === wanted);
  if (found) return found;
  return frames.value.find(({ job, key }) => job.state === 'running' && !key) ?? frames.value[0] ?? null;
});

export const lastSeed = computed(() => {
  const frame = onStage.value ?? frames.value[0];
  if (!frame || frame.job.request.seed == null) return null;
  return frame.job.request.seed + (frame.key ? frame.job.images.indexOf(frame.key) : 0);
});

/** A job as it was when it was sent: what events have told of it meanwhile is newer. */
export const accept = (job) => jobs.peek().has(job.id) || keep(job);

function keep(job) {
  const before = jobs.peek().get(job.id);
  heard.set(job.id, job);
  jobs.value = new Map(jobs.peek()).set(job.id, job);
  if (ended(job) && live.peek().has(job.id)) {
    const rest = new Map(live.peek());
    rest.delete(job.id);
    live.value = rest;
  }
  if (before && before.state !== job.state && ended(job)) {
    const said = { done: t('said_done', { n: job.images.length }), cancelled: t('cancelled') };
    announcement.value = said[job.state] ?? job.error?.message ?? '';
  }
}

function progress(told) {
  const before = live.peek().get(told.job);
  const now = { ...before, ...told };
  // Another image of the job: the preview of the one before it says nothing of this one.
  if (before && told.place !== undefined && told.place !== before.place && !told.preview) now.preview = undefined;
  live.value = new Map(live.peek()).set(told.job, now);
  const quarter = ({ step = 0, total = 1 }) => Math.floor((4 * step) / total);
  if (now.total > 3 && quarter(now) > quarter(before ?? {}) && now.step < now.total) {
    announcement.value = t('said_progress', { share: number(quarter(now) / 4, { style: 'percent' }) });
  }
}

/** Fetches the list; what is heard in the meantime is newer than what it says. */
async function load() {
  heard.clear();
  const [told] = await Promise.all([get(`jobs?limit=${MOST}`), loadFacts()]).catch(() => []);
  if (!told) return setTimeout(load, AGAIN);
  jobs.value = new Map([...told.jobs.map((job) => [job.id, job]), ...heard]);
}

/** Listens for as long as the page is open. Lists are fetched once the stream has begun, so that nothing is missed. */
export function follow() {
  const forget = (key) => (gone.value = new Set(gone.peek()).add(key));
  const recall = (key) => (gone.value = new Set([...gone.peek()].filter((one) => one !== key)));
  listen({
    hello: load,
    reset: load,
    job: keep,
    progress,
    worker: (told) => (worker.value = told),
    image: (data) => {
      recall(data.key);
      happened.value = { type: 'image', data };
    },
    removed: (data) => {
      forget(data.key);
      happened.value = { type: 'removed', data };
    },
  });
}
export const missing = (key) => (gone.value = new Set(gone.peek()).add(key));
