// Jobs and images as the server tells of them, and which one is on the stage.
import { computed, signal } from '@preact/signals';
import { get, listen } from './api.js';
import { number, t } from './i18n.js';
import { loadFacts, worker } from './plan.js';
import { announcement } from './screen.js';

const MOST = 60;
const AGAIN = 2000;

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
