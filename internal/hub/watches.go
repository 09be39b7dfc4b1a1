package hub

// Watching reports whether any room is mirrored.
func (h *Hub) Watching() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return len(h.mirrors) > 0
}

// Watches reports whether the room is mirrored.
func (h *Hub) Watches(room string) bool { return h.mirror(room) != nil }
