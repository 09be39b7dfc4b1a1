// What this connection publishes in a room. There is one state object per
// connection and room, and a new one replaces it. So typing, cursor and a new
// name are in one object: {typing: true, x: 0.2, y: 0.7, rev: 3}.
//
// Each part has a lifetime of its own. The state is published with an
// expireAfter that ends it with the first part to end. A page that still runs
// publishes the other parts again before that. A page that froze or lost its
// network cannot, and the server ends everything in time.

const LIFE = { typing: 3_000, cursor: 5_000, name: 2_000 }; // ms
const THROTTLE = 50; // ms between two publications: at most 20 a second
const RENEW = 1_000; // while the user types, publish again at this interval
const GRACE = 500; // time for publishing again the parts that last longer
const IN_FLIGHT = 4; // publications without an answer: a slow connection reduces the rate
const PAUSE = 1_000; // after a refusal or an error

export class Activity {
  #room;
  #report;
  #until = { typing: 0, cursor: 0, name: 0 };
  #x = 0;
  #y = 0;
  #rev = 0;
  #published = { at: 0, until: 0, parts: "" };
  #notBefore = 0; // when the next publication may go out
  #inFlight = 0;
  #waiting = false; // to be flushed when an answer comes
  #timer = 0;
  #timerAt = Infinity;
  #life = 0; // counts resets: answers from before a reset are ignored

  // room publishes (publish(state, expireAfter), clear()). Each failure is
  // passed to report(error), and each success calls report(null).
  constructor(room, report = () => {}) {
    this.#room = room;
    this.#report = report;
  }

  // typed handles a keystroke.
  typed() {
    const now = Date.now();
    this.#until.typing = now + LIFE.typing;
    const current = this.#published.parts.includes("typing") && now < this.#published.until;
    if (!current || now - this.#published.at >= RENEW) this.#schedule(now);
  }

  // rested ends typing before its time: the text was sent, emptied or left.
  rested() {
    this.#end("typing");
  }

  // moved handles a pointer movement, in fractions of the shared area.
  moved(x, y) {
    const now = Date.now();
    this.#x = Math.round(x * 1e4) / 1e4;
    this.#y = Math.round(y * 1e4) / 1e4;
    this.#until.cursor = now + LIFE.cursor;
    this.#schedule(now);
  }

  // left handles the pointer leaving the shared area.
  left() {
    this.#end("cursor");
  }

  // renamed publishes that this connection's metadata changed. Updates do not
  // carry metadata changes. So the state has a revision that the others
  // compare, and they ask for the metadata themselves.
  renamed() {
    const now = Date.now();
    this.#rev++;
    this.#until.name = now + LIFE.name;
    this.#schedule(now);
  }

  // reset forgets everything without publishing: the connection has ended, and
  // its state with it.
  reset() {
    clearTimeout(this.#timer);
    this.#timerAt = Infinity;
    this.#until = { typing: 0, cursor: 0, name: 0 };
    this.#published = { at: 0, until: 0, parts: "" };
    this.#notBefore = 0;
    this.#rev = 0;
    this.#inFlight = 0;
    this.#waiting = false;
    this.#life++;
  }

  #end(part) {
    const now = Date.now();
    if (this.#until[part] <= now) return;
    this.#until[part] = 0;
    this.#schedule(now);
  }

  // schedule flushes at that time, or as soon after it as the throttle allows.
  // It never postpones an earlier flush.
  #schedule(at) {
    at = Math.max(at, this.#notBefore);
    if (at >= this.#timerAt) return;
    clearTimeout(this.#timer);
    this.#timerAt = at;
    this.#timer = setTimeout(() => {
      this.#timerAt = Infinity;
      this.#flush();
    }, at - Date.now());
  }

  #flush() {
    if (this.#inFlight >= IN_FLIGHT) {
      this.#waiting = true;
      return;
    }
    const now = Date.now();
    if (now < this.#notBefore) {
      this.#schedule(this.#notBefore);
      return;
    }
    const parts = Object.keys(this.#until).filter((part) => this.#until[part] > now);
    if (parts.length > 0) this.#publish(parts, now);
    else if (now < this.#published.until) this.#clear(now);
  }

  #publish(parts, now) {
    const ends = parts.map((part) => this.#until[part]);
    const first = Math.min(...ends);
    const outlived = first < Math.max(...ends);
    const life = first - now + (outlived ? GRACE : 0);
    this.#published = { at: now, until: now + life, parts: parts.join() };
    this.#send(this.#room.publish(this.#state(parts), life), now);
    if (outlived) this.#schedule(first);
  }

  #clear(now) {
    this.#published = { at: now, until: 0, parts: "" };
    this.#send(this.#room.clear(), now);
  }

  #state(parts) {
    const state = {};
    if (parts.includes("typing")) state.typing = true;
    if (parts.includes("cursor")) Object.assign(state, { x: this.#x, y: this.#y });
    if (this.#rev > 0) state.rev = this.#rev;
    return state;
  }

  async #send(answer, now) {
    const life = this.#life;
    this.#inFlight++;
    this.#notBefore = now + THROTTLE;
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
      // Not in the room yet, or Redis does not answer: try again later if the
      // state still applies.
      this.#notBefore = Date.now() + PAUSE;
      this.#schedule(this.#notBefore);
    } else if (this.#waiting) {
      this.#waiting = false;
      this.#schedule(Date.now());
    }
  }
}
