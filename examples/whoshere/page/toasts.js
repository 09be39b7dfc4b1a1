// Short messages about users who came or left. The list is a live region, so a
// screen reader speaks each new message. Joins and leaves are collected for a
// moment and shown in one line. Otherwise the restart of a server would show a
// hundred messages. A user who left and came back within that moment has only
// reloaded the page.

import { Avatar, element } from "./elements.js";

const GATHER = 500; // ms
const LAST = 5_000; // ms
const FADE = 250; // ms, as in parts.css
const AT_ONCE = 4;
const NAMED = 2; // people named in one line
const NAME_LENGTH = 24; // characters of a name in it
const FACES = 3;

function names(people) {
  const list = people.map(({ name }) => {
    const short = [...name];
    return short.length > NAME_LENGTH ? `${short.slice(0, NAME_LENGTH - 1).join("")}…` : name;
  });
  return list.length > NAMED ? `${list[0]} and ${list.length - 1} others` : list.join(" and ");
}

export class Toasts {
  #list;
  #joined = new Map(); // user's key -> user
  #left = new Map();
  #timer = 0;

  constructor(list) {
    this.#list = list;
  }

  joined(user) {
    this.#gather(user, this.#joined, this.#left);
  }

  left(user) {
    this.#gather(user, this.#left, this.#joined);
  }

  // say shows a message that is not about people.
  say(text) {
    this.#flush();
    this.#add("note", text, []);
  }

  // forget discards the collected joins and leaves, which are about another
  // room.
  forget() {
    this.#joined.clear();
    this.#left.clear();
  }

  #gather(user, into, other) {
    if (!other.delete(user.key)) into.set(user.key, { ...user });
    if (this.#timer === 0) this.#timer = setTimeout(() => this.#flush(), GATHER);
  }

  #flush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const [joined, left] = [[...this.#joined.values()], [...this.#left.values()]];
    this.forget();
    if (joined.length > 0) this.#add("join", `${names(joined)} joined`, joined);
    if (left.length > 0) this.#add("leave", `${names(left)} left`, left);
  }

  #add(kind, text, people) {
    const toast = element("li", "toast");
    toast.dataset.kind = kind;
    for (const user of people.slice(0, FACES)) {
      const avatar = new Avatar();
      avatar.show(user);
      toast.append(avatar.el);
    }
    toast.append(element("span", "text", text));
    this.#list.append(toast);
    while (this.#list.children.length > AT_ONCE) this.#list.firstElementChild.remove();
    setTimeout(() => toast.classList.add("gone"), LAST);
    setTimeout(() => toast.remove(), LAST + FADE);
  }
}
