// The list of what happened. It is a live region, so a screen reader speaks
// what is added: arrivals and departures are gathered for a moment and told in
// one line, or a restart of the server would be told a hundred times.

import { element } from "./people.js";

const GATHER = 400; // ms
const KEEP = 8; // lines
const NAMED = 3; // people named in one line

function names(list) {
  if (list.length > NAMED) return `${list.slice(0, NAMED - 1).join(", ")} and ${list.length - NAMED + 1} others`;
  if (list.length > 1) return `${list.slice(0, -1).join(", ")} and ${list.at(-1)}`;
  return list[0];
}

export class Log {
  #list;
  #joined = [];
  #left = [];
  #timer = 0;

  constructor(list) {
    this.#list = list;
  }

  joined(name) {
    this.#gather(this.#joined, name);
  }

  left(name) {
    this.#gather(this.#left, name);
  }

  say(text) {
    this.#flush();
    const now = new Date();
    const time = element("time", "", now.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
    time.dateTime = now.toISOString();
    const line = element("li");
    line.append(time, element("span", "", text));
    this.#list.append(line);
    while (this.#list.children.length > KEEP) this.#list.firstElementChild.remove();
  }

  #gather(list, name) {
    list.push(name);
    if (this.#timer === 0) this.#timer = setTimeout(() => this.#flush(), GATHER);
  }

  #flush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const [joined, left] = [this.#joined.splice(0), this.#left.splice(0)];
    if (joined.length > 0) this.say(`${names(joined)} joined`);
    if (left.length > 0) this.say(`${names(left)} left`);
  }
}
