// What this connection publishes in a room: whether the user types, and where the pointer
// is. Both are in one state object, {typing: true, x: 0.2, y: 0.7}, and each is a patch of
// its own with a lifetime of its own. So neither ends or delays the other, and a page that
// froze or lost its network publishes nothing more, and the server ends both in time.

const LIFE = { typing: 3_000, cursor: 5_000 }; // ms
const NOTHING = { typing: { typing: null }, cursor: { x: null, y: null } };
const THROTTLE = 50; // ms between two publications: at most 20 a second
const RENEW = 1_000; // while the user types, publish again at this interval
const IN_FLIGHT = 4; // publications without an answer: a slow connection reduces the rate
const PAUSE = 1_000; // after a refusal or an error

export class Activity {
  #room;
  #report;
  #until = { typing: 0, cursor: 0 }; // when what is published of a part ends
  #typedAt = 0; // last publication of typing
  #due = new Map(); // part -> patch that waits
  #notBefore = 0; // when the next publication may go out
  #inFlight = 0;
  #timer = 0;
  #life = 0; // counts resets: answers from before a reset are ignored

  // room publishes (patch(state, expireAfter)). Each failure is passed to report(error),
  // and each success calls report(null).
  constructor(room, report = () => {}) {
    this.#room = room;
    this.#report = report;
  }

  // typed handles a keystroke.
  typed() {
    const now = Date.now();
    if (now < this.#until.typing && now - this.#typedAt < RENEW) return;
    this.#typedAt = now;
    this.#put("typing", { typing: true });
  }

  // rested ends typing before its time: the text was sent, emptied or left.
  rested() {
    this.#end("typing");
  }

  // moved handles a pointer movement, in fractions of the shared area.
  moved(x, y) {
    const round = (value) => Math.round(value * 1e4) / 1e4;
    this.#put("cursor", { x: round(x), y: round(y) });
  }

  // left handles the pointer leaving the shared area.
  left() {
    this.#end("cursor");
  }

  // reset forgets everything without publishing: the connection has ended, and
  // its state with it.
  reset() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#until = { typing: 0, cursor: 0 };
    this.#typedAt = 0;
    this.#due.clear();
    this.#notBefore = 0;
    this.#inFlight = 0;
    this.#life++;
  }

  #end(part) {
    if (this.#until[part] <= Date.now()) return;
    this.#put(part, NOTHING[part]);
    this.#until[part] = 0;
  }

  // put publishes a patch, as soon as the throttle allows. It replaces one of the same
  // part that still waits.
  #put(part, patch) {
    this.#until[part] = Date.now() + LIFE[part];
    this.#due.set(part, patch);
    this.#plan();
  }

  #plan() {
    if (this.#timer !== 0 || this.#due.size === 0 || this.#inFlight >= IN_FLIGHT) return;
    this.#timer = setTimeout(() => {
      this.#timer = 0;
      this.#flush();
    }, Math.max(0, this.#notBefore - Date.now()));
  }

  #flush() {
    this.#notBefore = Date.now() + THROTTLE;
    const due = [...this.#due];
    this.#due.clear();
    for (const [part, patch] of due) {
      const life = patch === NOTHING[part] ? undefined : LIFE[part];
      this.#send(part, patch, this.#room.patch(patch, life));
    }
  }

  async #send(part, patch, answer) {
    const life = this.#life;
    this.#inFlight++;
    let failure = null;
    let taken = false;
    try {
      taken = await answer;
    } catch (error) {
      failure = error;
    }
    if (life !== this.#life) return;
    this.#inFlight--;
    this.#report(failure);
    if (!taken) {
      // Not in the room yet, or Redis does not answer: try again later if the patch still
      // applies.
      this.#notBefore = Date.now() + PAUSE;
      const applies = patch !== NOTHING[part] && Date.now() < this.#until[part];
      if (applies && !this.#due.has(part)) this.#due.set(part, patch);
    }
    this.#plan();
  }
}
