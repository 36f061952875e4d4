// The keyboard. Letters alone can be switched off (WCAG 2.1.4) and never act while somebody types.
import { cancelCurrent, generate, removeShown, showNext } from './actions.js';
import { dialog, open, preferences, prefer, view } from './screen.js';
import { redo, undo } from './settings.js';

const focusPrompt = () => {
  view.value = 'create';
  requestAnimationFrame(() => document.getElementById('prompt')?.focus());
};

export const SHORTCUTS = [
  { keys: ['ctrl', 'enter'], label: 'generate', run: generate },
  { keys: ['escape'], label: 'cancel_run', run: cancelCurrent },
  { keys: ['ctrl', 'z'], label: 'undo_settings', run: undo },
  { keys: ['ctrl', 'shift', 'z'], label: 'redo_settings', run: redo },
  { keys: ['p'], label: 'go_prompt', run: focusPrompt },
  { keys: ['c'], label: 'go_create', run: () => (view.value = 'create') },
  { keys: ['g'], label: 'go_gallery', run: () => (view.value = 'gallery') },
  { keys: ['j'], label: 'older', run: () => showNext(1) },
  { keys: ['k'], label: 'newer', run: () => showNext(-1) },
  { keys: ['delete'], label: 'delete', run: removeShown },
  { keys: ['s'], label: 'toggle_panel', run: () => prefer({ panel: !preferences.peek().panel }) },
  { keys: ['?'], label: 'shortcuts', run: () => open('help') },
];

const TYPING = 'textarea, select, input:not([type=range], [type=checkbox], [type=button])';
const typing = (element) => element.matches?.(TYPING);

function matches({ keys }, event) {
  const command = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (keys.includes('ctrl') !== command || event.altKey) return false;
  // "?" is typed with Shift on many keyboards; only combinations with Ctrl ask for it.
  if (command && keys.includes('shift') !== event.shiftKey) return false;
  return keys.at(-1) === key;
}

/** Acts on a key; `true` if it was one of ours. */
export function onKey(event) {
  if (event.defaultPrevented || event.isComposing || dialog.peek()) return;
  const found = SHORTCUTS.find((one) => matches(one, event));
  if (!found) return;
  const single = found.keys.length === 1;
  if (typing(event.target) && found.label !== 'generate' && found.label !== 'cancel_run') return;
  if (single && found.keys[0] !== 'escape' && !preferences.peek().letters) return;
  event.preventDefault();
  found.run();
}
