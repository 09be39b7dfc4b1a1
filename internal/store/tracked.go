package store

// TrackedBy sets the function that reports whether a room has a rule on this server.
// After the last member of a room has left, its position is kept for an hour if the
// room is tracked and was in use, and for seconds otherwise. If servers differ, the one
// that ends the last entry decides. The function must not block and must be safe for
// concurrent use. Call TrackedBy before use.
func (s *Store) TrackedBy(tracked func(room string) bool) { s.tracks = tracked }

func (s *Store) isTracked(room string) bool { return s.tracks != nil && s.tracks(room) }
