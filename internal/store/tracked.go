package store

// TrackedBy says which rooms have a rule on this server. The position of a room
// that was in use is kept for an hour after the last member has left if the room
// is tracked, and for seconds otherwise. Servers may differ: the one that ends the
// last entry decides. The function must not block, and is safe for concurrent use.
// Call TrackedBy before use.
func (s *Store) TrackedBy(tracked func(room string) bool) { s.tracks = tracked }

func (s *Store) isTracked(room string) bool { return s.tracks != nil && s.tracks(room) }
