// What is on the screen, beside what the server knows: view, dialog, messages, and preferences that are remembered.
import { signal } from '@preact/signals';
import { saved, save } from './storage.js';

export const view = signal('create');
/** The dialog that is open, {name, ...}, or null. */
export const dialog = signal(null);
export const open = (name, rest = {}) => (dialog.value = { name, ...rest });
export const close = () => (dialog.value = null);

const DEFAULTS = { theme: 'system', advanced: false, negative: false, panel: true, letters: true };
export const preferences = signal({ ...DEFAULTS, ...saved('preferences') });
export function prefer(fields) {
  preferences.value = { ...preferences.peek(), ...fields };
  save('preferences', preferences.peek());
}

/** Messages at the edge of the screen: {id, text, kind, action: {label, run}}. */
export const messages = signal([]);
let count = 0;

/** Shows a message for some seconds; one with an action stays longer, an error until it is closed. */
export function say(text, { kind = 'info', action } = {}) {
  const message = { id: (count += 1), text, kind, action };
  messages.value = [...messages.peek().slice(-2), message];
  if (kind !== 'error') setTimeout(() => dismiss(message.id), action ? 12000 : 5000);
  return message.id;
}
export const dismiss = (id) => (messages.value = messages.peek().filter((one) => one.id !== id));

/** What a screen reader says next. */
export const announcement = signal('');
