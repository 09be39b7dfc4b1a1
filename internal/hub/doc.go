// Package hub keeps a mirror of every room with a subscriber on this server. It
// decides what subscribers see: a view of the room, then every later change in
// order.
//
// A mirror applies the events of its room. Each event names the event before it,
// so a mirror notices a missing one. If an event does not fit, or a comparison
// with Redis finds a difference, the hub reads a snapshot of the room and delivers
// exactly the difference to the subscribers.
//
// If Redis may have lost writes, a member that is missing from a snapshot has
// either left or been lost. Such a member is unconfirmed. It stays listed until
// its owner writes it again, its owner says that it has left, or its time is over.
//
// A member whose connection has ended may stay as disconnected, because its place is
// kept. No server owns such a member: only Redis confirms it.
//
// A mirror counts the connections and the users of its room as its subscribers know
// them. Every update has the numbers after it, also in a repair.
//
// # Locks
//
// Hub.mu guards the set of mirrors. Each mirror has its own lock for its contents.
// No goroutine holds both, and none holds either of them across a call to the
// store. The locks of timers, snapshotQueue, compareQueue and recentJoins are
// innermost: code that holds one of them takes no other lock.
package hub
