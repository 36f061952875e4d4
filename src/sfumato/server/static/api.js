// The server's native API; its words are in server/native.py.
import { signal } from '@preact/signals';

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
