// Making and filling elements. Nothing is ever parsed as HTML: text goes in as
// text, and the page's policy (trusted-types 'none') forbids the rest.

import { initials, onColor } from "./person.js";

export const $ = (id) => document.getElementById(id);

export function element(tag, className, ...children) {
  const el = document.createElement(tag);
  if (className) el.className = className;
  el.append(...children);
  return el;
}

// setText spares the browser, and screen readers, what has not changed.
export function setText(el, text) {
  if (el.textContent !== text) el.textContent = text;
}

// paint gives an element, and what is in it, a person's colour.
export function paint(el, color) {
  el.style.setProperty("--person", color);
  el.style.setProperty("--on-person", onColor(color));
}

// dots are the three that move while somebody types.
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
