// Texts in the reader's language: one JSON file a language, plurals by Intl.PluralRules.
import { computed, signal } from '@preact/signals';
import { save, saved } from './state.js';

export const LANGUAGES = { en: 'English', zh: '中文', ko: '한국어', ar: 'العربية', es: 'Español' };
const RIGHT_TO_LEFT = ['ar'];

export const language = signal('en');
const texts = signal({});
const plurals = computed(() => new Intl.PluralRules(language.value));

/** Loads a language and shows the page in it. */
export async function speak(code) {
  const answer = await fetch(new URL(`locales/${code}.json`, import.meta.url));
  texts.value = await answer.json();
  language.value = code;
  document.documentElement.lang = code;
  document.documentElement.dir = RIGHT_TO_LEFT.includes(code) ? 'rtl' : 'ltr';
}

/** Changes the language and remembers the choice. */
export async function choose(code) {
  await speak(code);
  save('language', code);
}

/** The language chosen earlier, or the browser's first one that there are texts in. */
export function preferred() {
  const wanted = [saved('language'), ...navigator.languages.map((tag) => tag.split('-')[0])];
  return wanted.find((code) => code in LANGUAGES) ?? 'en';
}

/** The text of a key, with {names} filled in; numbers are written as the language writes them, n chooses the plural. */
export function t(key, values = {}) {
  let text = texts.value[key] ?? key;
  if (typeof text === 'object') text = text[plurals.value.select(values.n)] ?? text.other;
  return text.replace(/\{(\w+)\}/g, (whole, name) => {
    const value = values[name];
    return typeof value === 'number' ? number(value) : (value ?? whole);
  });
}

export const number = (value, options) => new Intl.NumberFormat(language.value, options).format(value);

/** Bytes in the unit that suits them, with a decimal place where it says something: "26 kB", "2.4 GB". */
export function size(bytes) {
  const power = bytes >= 1e9 ? 3 : bytes >= 1e6 ? 2 : 1;
  const value = bytes / 1000 ** power;
  const unit = ['kilobyte', 'megabyte', 'gigabyte'][power - 1];
  const places = value < 10 || (power === 3 && value < 100) ? 1 : 0;
  return number(value, { style: 'unit', unit, maximumFractionDigits: places });
}

/** A duration to read at a glance: "8 sec", "3 min", "1 hr 5 min". */
export function duration(seconds) {
  const write = (value, unit) => number(Math.round(value), { style: 'unit', unit, unitDisplay: 'short' });
  if (seconds < 90) return write(Math.max(1, seconds), 'second');
  if (seconds < 5400) return write(seconds / 60, 'minute');
  return `${write(Math.floor(seconds / 3600), 'hour')} ${write((seconds % 3600) / 60, 'minute')}`;
}

export const when = (seconds) =>
  new Intl.DateTimeFormat(language.value, { dateStyle: 'medium', timeStyle: 'short' }).format(new Date(seconds * 1000));
