// The page: one connection, one room at a time. mesh.js and room.js speak the
// protocol, activity.js publishes the user's own actions, and view.js draws the
// other users.

import { Activity } from "./activity.js";
import { startDialog } from "./dialog.js";
import { $ } from "./elements.js";
import { Me } from "./me.js";
import { MeshClient } from "./mesh.js";
import { person } from "./person.js";
import { Switcher, asWhom, roomFromURL } from "./rooms.js";
import { Status } from "./status.js";
import { Toasts } from "./toasts.js";
import { RoomView } from "./view.js";

const setting = (name) => document.querySelector(`meta[name="${name}"]`).content;

const namesAllowed = setting("client-metadata") === "true";
const me = new Me(asWhom());
const client = new MeshClient(socketURL(), { pingInterval: Number(setting("ping-interval")) });
const status = new Status(client, () => room);
const switcher = new Switcher();
const toasts = new Toasts($("toasts"));
const view = new RoomView(() => client.id);

let room = null;
let activity = null;
let seenBefore = false; // this room has been live on this page

// A browser's socket cannot have headers of ours, so the key is in the address.
function socketURL() {
  const url = new URL("ws", location.href.replace(/^http/, "ws"));
  // Level 2: changes of metadata and ends of connections arrive as updates, and a state
  // that is not taken is answered with the reason.
  url.search = new URLSearchParams({ key: me.key, "mesh-level": "2" });
  url.hash = "";
  return url;
}

// --- who we are -------------------------------------------------------------

function startMe() {
  if (!namesAllowed) {
    $("edit-me").hidden = true;
    return;
  }
  client.setMetadata(me.metadata);
  me.addEventListener("change", () => client.setMetadata(me.metadata));
  startDialog(me, () => {
    const own = room.members.get(client.id);
    return person(own?.metadata ?? me.metadata, client.id ?? "", own?.userId);
  });
}

// --- the room ---------------------------------------------------------------

function goToURL() {
  const name = roomFromURL();
  if (name === room?.name) return;
  activity?.reset();
  room?.leave();
  toasts.forget();
  const entered = client.enter(name);
  room = entered;
  activity = new Activity(room, (error) => error?.code === "EUNAVAILABLE" && entered.doubt());
  seenBefore = false;
  listen(room);
  view.show(room);
  switcher.show(name);
  status.entered();
}

// listen handles the events of a room until we leave it. An answer may come
// after that.
function listen(entered) {
  const on = (type, handle) => {
    entered.addEventListener(type, ({ detail }) => entered === room && handle(detail));
  };
  on("status", roomStatus);
  on("snapshot", rebuilt);
  for (const type of ["metadata", "place", "state"]) on(type, (member) => view.changed(member));
  on("join", (member) => {
    const user = view.joined(member);
    if (user !== null) toasts.joined(user);
  });
  on("leave", (member) => {
    const user = view.left(member);
    if (user !== null) toasts.left(user);
  });
}

function roomStatus() {
  if (room.status !== "live") view.clearCursors();
  if (room.status === "down") activity.reset();
  view.redraw();
  status.show();
}

function rebuilt() {
  view.reset();
  status.entered();
  if (seenBefore) toasts.say("Reconnected");
  seenBefore = true;
}

// --- what we do -------------------------------------------------------------

function watchPointer() {
  const stage = $("stage");
  const moved = (event) => {
    const box = $("cursors").getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width;
    const y = (event.clientY - box.top) / box.height;
    if (x >= 0 && x <= 1 && y >= 0 && y <= 1) activity.moved(x, y);
  };
  stage.addEventListener("pointerdown", moved);
  stage.addEventListener("pointermove", moved);
  // A mouse that leaves is gone. After a touch the cursor stays for a moment.
  stage.addEventListener("pointerleave", ({ pointerType }) => pointerType === "touch" || activity.left());
}

function watchTyping() {
  const draft = $("draft");
  draft.addEventListener("input", () => (draft.value === "" ? activity.rested() : activity.typed()));
  draft.addEventListener("blur", () => activity.rested());
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    draft.value = "";
    activity.rested();
  });
}

// A page in the back-forward cache must not keep its socket.
function watchPage() {
  addEventListener("online", () => client.connect());
  addEventListener("pagehide", () => client.close());
  addEventListener("pageshow", (event) => event.persisted && client.connect());
}

switcher.addEventListener("change", goToURL);
startMe();
goToURL();
watchPointer();
watchTyping();
watchPage();
client.connect();
