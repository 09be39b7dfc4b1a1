// The pointers of the others, in a layer above the shared area.

import { $, dots, element, paint, setText } from "./elements.js";

const LIMIT = 100; // shown at once
const FADE = 200; // ms, as in parts.css
const SVG = "http://www.w3.org/2000/svg";

const inside = (n) => Number.isFinite(n) && n >= 0 && n <= 1;

class Cursor {
  el = element("div", "cursor");
  #label = element("span", "label");
  #x = 0;
  #y = 0;

  constructor(id) {
    const arrow = document.createElementNS(SVG, "svg");
    const path = document.createElementNS(SVG, "path");
    arrow.setAttribute("viewBox", "-1 -1 20 22");
    path.setAttribute("d", "M1.2 1.4 6.2 18.6 9.7 11.6 17 9.1Z");
    arrow.append(path);
    this.el.dataset.id = id;
    this.el.append(arrow, element("span", "flag", this.#label, dots()));
  }

  show(user, typing) {
    setText(this.#label, user.name);
    paint(this.el, user.color);
    this.el.classList.toggle("typing", typing);
  }

  move(x, y) {
    this.#x = x;
    this.#y = y;
    this.place();
  }

  // place is called again when the size of the shared area changes.
  place() {
    const area = $("cursors");
    const left = this.#x * area.clientWidth;
    const top = this.#y * area.clientHeight;
    this.el.style.transform = `translate(${left.toFixed(1)}px, ${top.toFixed(1)}px)`;
    this.el.classList.toggle("left", left > area.clientWidth - 140);
    this.el.classList.toggle("above", top > area.clientHeight - 50);
  }

  // fade removes the cursor, at once if the user wants reduced motion.
  fade() {
    this.el.classList.add("gone");
    setTimeout(() => this.el.remove(), FADE);
  }
}

// Cursors shows a cursor for each member whose state has a pointer position.
export class Cursors {
  #cursors = new Map(); // connection id -> Cursor
  #resize = new ResizeObserver(() => this.#cursors.forEach((cursor) => cursor.place()));

  constructor() {
    this.#resize.observe($("cursors"));
  }

  // show moves a member's cursor to the position in its state. It does so at
  // once, because cursors move more often than anything else on the page.
  show(member, user, typing) {
    const { x, y } = member.state ?? {};
    if (!inside(x) || !inside(y)) {
      this.remove(member.id);
      return;
    }
    let cursor = this.#cursors.get(member.id);
    if (cursor === undefined) {
      if (this.#cursors.size >= LIMIT) return;
      cursor = new Cursor(member.id);
      cursor.move(x, y); // before it is shown, so that it does not fly in
      this.#cursors.set(member.id, cursor);
      $("cursors").append(cursor.el);
    } else {
      cursor.move(x, y);
    }
    cursor.show(user, typing);
  }

  remove(id) {
    this.#cursors.get(id)?.fade();
    this.#cursors.delete(id);
  }

  clear() {
    this.#cursors.clear();
    $("cursors").replaceChildren();
  }
}
