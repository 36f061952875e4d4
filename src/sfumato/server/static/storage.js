// What survives a reload: small values in localStorage, which may be full or forbidden, and pictures in IndexedDB.
const PREFIX = 'sfumato.';

export function saved(name, fallback = null) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function save(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Without storage the page works as well, until it is closed.
  }
}

const database = () =>
  new Promise((resolve, reject) => {
    const request = indexedDB.open('sfumato', 1);
    request.onupgradeneeded = () => request.result.createObjectStore('drafts');
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

async function transact(mode, act) {
  try {
    const opened = await database();
    return await new Promise((resolve, reject) => {
      const request = act(opened.transaction('drafts', mode).objectStore('drafts'));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  } catch {
    return undefined;
  }
}

export const savedDraft = (name) => transact('readonly', (store) => store.get(name));
export const saveDraft = (name, value) =>
  transact('readwrite', (store) => (value == null ? store.delete(name) : store.put(value, name)));
