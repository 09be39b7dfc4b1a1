// Package occupancy keeps the numbers of rooms (connections and users) for watchers that
// do not need the lists of members. Unlike a mirror of the hub, a room here is two
// numbers and a position.
//
// # Reading
//
// An event of a room says only that the numbers may have changed. The room is then read
// from Redis, at most once per interval of the room, together with all other rooms that
// are to be read. A reading has the numbers and the position of one moment. So at one
// seq the numbers equal the list, and 500 joins a second cost one reading per interval.
//
// Besides, a room is read if a watcher comes and events have arrived since the last
// reading, after each confirmation of its channel, after Resync, and once per
// CompareEvery.
//
// # Pushes
//
//   - There is at most one push per interval and room.
//   - The last numbers are always pushed. Equal numbers are not pushed again.
//   - A change is pushed at once if the last push, and the last reading that an event
//     caused, are at least one interval old. So a room that gets its first member shows.
//   - A room that has become empty is pushed one interval after the reading that showed
//     it, if nothing has happened since. Otherwise a client that joins and leaves an empty
//     room all the time would make the numbers of all watchers flicker.
//   - If Redis does not answer, or events may be missed, for longer than StaleAfter, the
//     last numbers are pushed as stale. When the room has been read again, they are pushed
//     as not stale.
//   - If Redis may have lost a part of the room, the numbers are uncertain. Then the last
//     numbers stay, as stale. See Reading.
//
// Each watcher has its own last numbers, because a later one starts with newer ones. A
// push goes to the watchers that have others.
//
// # Locks
//
// Rooms.registry is locked first, then room.mu. The locks of readQueue and dueList, and
// Rooms.mu, are innermost: code that holds one of them takes no other lock. No lock is
// held across a call to the store.
package occupancy
