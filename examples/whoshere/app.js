// The page: one connection, one room at a time. mesh.js and room.js speak the
// protocol, activity.js says what we do, view.js draws what the others do.

import { Activity } from "./activity.js";
import { Log } from "./log.js";
import { MeshClient } from "./mesh.js";
import { cutName, person, randomPerson } from "./people.js";
import { RoomView } from "./view.js";

const STORED = "whoshere.me";
const STATUS = {
  connecting: "Connecting…",
  open: "Online",
  waiting: "Offline, trying again…",
  closed: "Offline",
};

const $ = (id) => document.getElementById(id);
const setting = (name) => document.querySelector(`meta[name="${name}"]`).content;

const namesAllowed = setting("client-metadata") === "true";
const client = new MeshClient(new URL("ws", location.href.replace(/^http/, "ws")), {
  pingInterval: Number(setting("ping-interval")),
});
const log = new Log($("log"));
const view = new RoomView(() => myID);
const revisions = new Map(); // connection id -> revision of the metadata we have

let myID = null; // kept while offline, for the list that stays on the screen
let me = recall() ?? remember(randomPerson());
let room = null;
let activity = null;
let seenBefore = false; // this room has been live on this page
let redisTrouble = false;

// --- who we are -------------------------------------------------------------

// Storage may be forbidden, or hold what an older page left.
function recall() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORED));
    return stored && person(stored);
  } catch {
    return null;
  }
}

function remember(who) {
  try {
    localStorage.setItem(STORED, JSON.stringify(who));
  } catch {
    // It lasts as long as the page, then.
  }
  return who;
}

function showMe() {
  $("my-name").value = me.name;
  $("my-color").value = me.color;
}

function becomes(who) {
  me = who;
  showMe();
  if (namesAllowed) client.setMetadata(me);
}

function startForm() {
  if (namesAllowed) {
    showMe();
    client.setMetadata(me);
  } else {
    for (const el of $("me-form").elements) el.disabled = true;
    $("me-hint").hidden = false;
  }
  $("me-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = cutName($("my-name").value);
    if (name !== "") becomes(remember({ name, color: $("my-color").value }));
  });
  // Another tab of ours took another name.
  addEventListener("storage", (event) => {
    if (event.key !== STORED) return;
    const who = recall();
    if (who !== null) becomes(who);
  });
}

// --- the room ---------------------------------------------------------------

// roomFromURL reads #name, else ?room=name.
function roomFromURL() {
  let name = location.hash.slice(1);
  try {
    name = decodeURIComponent(name);
  } catch {
    // A lone percent sign: taken as it stands.
  }
  return name.trim() || new URLSearchParams(location.search).get("room")?.trim() || "lobby";
}

function linkTo(name) {
  return `${location.pathname}?room=${encodeURIComponent(name)}`;
}

function goToURL() {
  const name = roomFromURL();
  if (name === room?.name) return;
  activity?.reset();
  room?.leave();
  room = client.enter(name);
  activity = new Activity(room, published);
  seenBefore = false;
  revisions.clear();
  listen(room);
  view.show(room);
  $("room-name").value = name;
  $("another").href = linkTo(name);
  notice();
}

// listen hears a room until we leave it: an answer may still be on its way.
function listen(entered) {
  const on = (type, handle) => {
    entered.addEventListener(type, ({ detail }) => entered === room && handle(detail));
  };
  on("status", roomStatus);
  on("snapshot", rebuilt);
  on("metadata", (member) => view.changed(member));
  on("state", (member) => {
    checkRevision(member);
    view.changed(member);
  });
  on("join", (member) => {
    view.changed(member);
    log.joined(nameOf(member));
  });
  on("leave", (member) => {
    revisions.delete(member.id);
    view.gone(member);
    log.left(nameOf(member));
  });
}

const nameOf = (member) => person(member.metadata, member.id).name;

function roomStatus() {
  if (room.status !== "live") view.clearCursors();
  if (room.status === "down") activity.reset();
  view.redraw();
  notice();
}

function rebuilt() {
  revisions.clear();
  for (const member of room.members.values()) {
    if (Number.isInteger(member.state?.rev)) revisions.set(member.id, member.state.rev);
  }
  view.reset();
  const people = room.total === 1 ? "nobody else" : `${room.total} people`;
  log.say(seenBefore ? `Back in ${room.name}: ${people} here` : `You are in ${room.name}: ${people} here`);
  seenBefore = true;
}

// checkRevision asks for a member's metadata when its state says that it has
// changed: see Activity.renamed.
function checkRevision(member) {
  const rev = member.state?.rev;
  const known = revisions.get(member.id) ?? 0;
  if (!Number.isInteger(rev) || rev === known) return;
  revisions.set(member.id, rev);
  room.refresh(member.id).catch(() => {
    // The next state brings it up again, but not the next twenty at once.
    setTimeout(() => revisions.get(member.id) === rev && revisions.delete(member.id), 2_000);
  });
}

// --- what is wrong ----------------------------------------------------------

function published(error) {
  const trouble = error?.code === "EUNAVAILABLE";
  if (trouble === redisTrouble) return;
  redisTrouble = trouble;
  notice();
}

function notice(text = trouble()) {
  $("notice").hidden = text === "";
  if ($("notice").textContent !== text) $("notice").textContent = text;
}

function trouble() {
  if (room.status === "refused") return "This server does not show who is in this room.";
  if (room.status === "ended") return "You may no longer see who is in this room.";
  if (room.stale) return "Redis is away. This is who was here when it was last heard of.";
  if (redisTrouble) return "Redis is away. What you do is shown when it is back.";
  return "";
}

// --- the connection ---------------------------------------------------------

function watchClient() {
  client.addEventListener("status", ({ detail: status }) => {
    $("status").dataset.status = status;
    $("status-text").textContent = STATUS[status];
    if (status === "open") myID = client.id;
    else $("latency").textContent = "";
  });
  client.addEventListener("latency", ({ detail: ms }) => {
    $("latency").textContent = `${Math.round(ms)} ms`;
  });
  // On the first connection the name travels ahead of the join.
  client.addEventListener("metadata", () => room.joined && activity.renamed());
  client.addEventListener("trouble", ({ detail: error }) => {
    if (!error.passing) notice(error.message);
    else if (room.status !== "live") notice("The server cannot let us in yet. Trying again…");
  });
  addEventListener("online", () => client.connect());
  // A page in the back-forward cache must not keep its socket.
  addEventListener("pagehide", () => client.close());
  addEventListener("pageshow", (event) => event.persisted && client.connect());
}

// --- what we do -------------------------------------------------------------

function watchInput() {
  const stage = $("stage");
  const draft = $("draft");
  stage.addEventListener("pointermove", (event) => {
    const box = $("cursors").getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width;
    const y = (event.clientY - box.top) / box.height;
    if (x >= 0 && x <= 1 && y >= 0 && y <= 1) activity.moved(x, y);
  });
  stage.addEventListener("pointerleave", () => activity.left());
  stage.addEventListener("pointercancel", () => activity.left());
  draft.addEventListener("input", () => (draft.value === "" ? activity.rested() : activity.typed()));
  draft.addEventListener("blur", () => activity.rested());
  $("room-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const name = $("room-name").value.trim();
    if (name === "") return;
    history.pushState(null, "", linkTo(name));
    goToURL();
  });
  addEventListener("popstate", goToURL); // and when the hash changes
}

watchClient();
startForm();
goToURL();
watchInput();
client.connect();
