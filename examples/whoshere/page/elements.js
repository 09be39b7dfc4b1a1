// Making and filling elements. Nothing is ever parsed as HTML. Text is inserted
// as text, and the page's policy (trusted-types 'none') forbids anything else.

import { initials, onColor } from "./person.js";

export const $ = (id) => document.getElementById(id);

export function element(tag, className, ...children) {
  const el = document.createElement(tag);
  if (className) el.className = className;
  el.append(...children);
  return el;
}

// setText changes the text only if it differs, which saves work for browsers
// and screen readers.
export function setText(el, text) {
  if (el.textContent !== text) el.textContent = text;
}

// paint gives an element and its children a person's colour.
export function paint(el, color) {
  el.style.setProperty("--person", color);
  el.style.setProperty("--on-person", onColor(color));
}

// dots makes the three dots that move while a user types.
export function dots() {
  const el = element("span", "dots", element("i"), element("i"), element("i"));
  el.setAttribute("aria-hidden", "true");
  return el;
}

export class Avatar {
  el = element("span", "avatar");
  #text = element("span");

  constructor() {
    this.el.setAttribute("aria-hidden", "true");
    this.el.append(this.#text);
  }

  show({ name, color }) {
    setText(this.#text, initials(name));
    paint(this.el, color);
  }
}
