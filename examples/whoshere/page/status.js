// The status of the connection in one word, with a sentence if one word is not
// enough.

import { $, setText } from "./elements.js";

const WORDS = {
  connecting: "Connecting…",
  live: "Live",
  reconnecting: "Reconnecting…",
  stale: "Out of date",
  offline: "Offline",
};

export class Status {
  #client;
  #room; // the status of the current room
  #wasOpen = false;
  #passing = ""; // a temporary error of the server while it is tried again

  constructor(client, room) {
    this.#client = client;
    this.#room = room;
    client.addEventListener("status", () => {
      if (client.status === "open") this.#wasOpen = true;
      else setText($("latency"), "");
      this.show();
    });
    client.addEventListener("latency", ({ detail: ms }) => {
      if (typeof ms === "number") setText($("latency"), `${Math.round(ms)} ms`);
    });
    client.addEventListener("trouble", ({ detail: error }) => {
      if (!error.passing) this.#passing = error.message;
      else if (room()?.status !== "live") this.#passing = "The server cannot let us in yet. Trying again…";
      this.show();
    });
    addEventListener("online", () => this.show());
    addEventListener("offline", () => this.show());
  }

  // entered clears errors from before the room was live, or about another room.
  entered() {
    this.#passing = "";
    this.show();
  }

  show() {
    const word = this.#word();
    $("status").dataset.status = word;
    setText($("status-text"), WORDS[word]);
    const sentence = this.#sentence();
    $("notice").hidden = sentence === "";
    setText($("notice"), sentence);
  }

  #word() {
    const room = this.#room();
    if (this.#client.status === "open" && room?.status !== "entering") {
      return room?.stale ? "stale" : "live";
    }
    if (this.#client.status === "closed" || !navigator.onLine) return "offline";
    return this.#wasOpen ? "reconnecting" : "connecting";
  }

  #sentence() {
    const room = this.#room();
    if (room?.status === "refused") return "This server does not show who is in this room.";
    if (room?.status === "ended") return "You may no longer see who is in this room.";
    if (room?.bar === "full") return "This room is full. You can see who is here, but they cannot see you.";
    if (room?.bar === "removed") return "You were taken out of this room.";
    if (room?.bar === "refused") return "You may not be in this room.";
    if (room?.stale) return "The server cannot reach Redis. This is who was here when it last could.";
    return this.#passing;
  }
}
