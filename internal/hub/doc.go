// Package hub keeps a mirror of every room that somebody on this server
// watches, and decides what its subscribers see: a view of the room, then
// every later change in order.
//
// A mirror follows the room's events, each of which says which one came
// before it. What does not fit, and what a comparison with Redis finds
// missing, is made good by a snapshot: subscribers are told exactly the
// difference between what they know and what is true.
//
// Where Redis may have lost something, who is missing from a snapshot has left
// or was lost: such members are in doubt. They are listed on until their owners
// have written them again, or say that they have left, or their time is up.
//
// # Locks
//
// Hub.mu guards which mirrors there are; each mirror has a lock of its own
// for everything in it. Neither is taken while the other is held, and none is
// held across a call to the store. The locks of alarms, jobs, comparisons and
// joins are innermost: nothing else is taken under them.
package hub
