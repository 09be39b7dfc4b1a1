// The user of this browser: a secret key, a name and a colour. The browser
// stores them, so that the user is the same after a reload and in every tab.

import { cutName, isColor, randomName } from "./person.js";

const STORED = "whoshere.me";

// newKey also works on plain http, where randomUUID does not exist.
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(18));
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_");
}

// Me is this browser's user. With ?as=… in the address it is another user, to
// try the page without a second browser.
//
// Event: "change" (the name or colour changed, here or in another tab).
export class Me extends EventTarget {
  key = newKey(); // sent to the server only; the others get its hash
  name = randomName();
  color = ""; // "": the default colour of the user

  #slot;

  constructor(as = "") {
    super();
    this.#slot = as === "" ? STORED : `${STORED}.${as}`;
    this.#recall();
    this.#remember();
    addEventListener("storage", (event) => {
      if (event.key !== this.#slot) return;
      const { name, color } = this;
      this.#recall();
      if (name !== this.name || color !== this.color) this.#changed();
    });
  }

  get metadata() {
    return this.color === "" ? { name: this.name } : { name: this.name, color: this.color };
  }

  become(name, color) {
    this.name = cutName(name) || this.name;
    this.color = isColor(color) ? color : "";
    this.#remember();
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  // Storage may be forbidden, or hold data of another version of the page.
  #recall() {
    try {
      const stored = JSON.parse(localStorage.getItem(this.#slot)) ?? {};
      if (typeof stored.key === "string" && stored.key.length === this.key.length) this.key = stored.key;
      if (typeof stored.name === "string") this.name = cutName(stored.name) || this.name;
      this.color = isColor(stored.color) ? stored.color : "";
    } catch {
      // A new user, then.
    }
  }

  #remember() {
    const { key, name, color } = this;
    try {
      localStorage.setItem(this.#slot, JSON.stringify({ key, name, color }));
    } catch {
      // It lasts as long as the page, then.
    }
  }
}
