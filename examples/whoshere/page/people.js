// The list of people, with one row for each user, even if the user has several
// tabs.

import { $, Avatar, dots, element, paint, setText } from "./elements.js";
import { isAway, isTyping } from "./users.js";

const LISTED = 200; // rows; the rest is counted

class Row {
  el = element("li");
  #avatar = new Avatar();
  #name = element("span", "name");
  #note = element("span", "note");

  constructor(key) {
    this.el.dataset.user = key;
    this.#avatar.el.append(dots());
    this.el.append(this.#avatar.el, element("span", "who", this.#name, this.#note));
  }

  show(user, mine, typing) {
    const tabs = user.members.size;
    const away = isAway(user);
    const notes = [mine && "you", tabs > 1 && `${tabs} tabs`, typing && "typing…", away && "reconnecting…"].filter(Boolean);
    this.#avatar.show(user);
    setText(this.#name, user.name);
    setText(this.#note, notes.join(" · "));
    this.#name.title = user.name;
    this.el.dataset.tabs = String(tabs);
    this.el.classList.toggle("mine", mine);
    this.el.classList.toggle("typing", typing);
    this.el.classList.toggle("away", away);
    paint(this.el, user.color);
  }
}

export class People {
  #rows = new Map(); // user's key -> Row

  // show lists the users in the given order. If live is true, their states are
  // known too.
  show(users, mine, live) {
    const rows = new Map();
    for (const user of users.slice(0, LISTED)) {
      const row = this.#rows.get(user.key) ?? new Row(user.key);
      row.show(user, user.key === mine, live && isTyping(user));
      rows.set(user.key, row);
    }
    this.#rows = rows;
    this.#arrange([...rows.values()].map((row) => row.el));
    return rows.size;
  }

  // arrange moves only the rows that are out of place.
  #arrange(rows) {
    const list = $("people");
    rows.forEach((row, i) => {
      if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
    });
    while (list.children.length > rows.length) list.lastElementChild.remove();
  }
}
