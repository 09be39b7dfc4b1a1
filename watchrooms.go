package mesh

// rooms returns the rooms that have subscriptions on this server.
func (w *watchers) rooms() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := make([]string, 0, len(w.byRoom))
	for room := range w.byRoom {
		list = append(list, room)
	}
	return list
}

// enterRoom puts a subscription on the list of its room. The caller holds mu.
func (w *watchers) enterRoom(s *subscription) {
	set := w.byRoom[s.room]
	if set == nil {
		set = make(map[*subscription]struct{})
		w.byRoom[s.room] = set
	}
	set[s] = struct{}{}
}

// leaveRoom takes a subscription off the list of its room. The caller holds mu.
func (w *watchers) leaveRoom(s *subscription) {
	set := w.byRoom[s.room]
	delete(set, s)
	if len(set) == 0 {
		delete(w.byRoom, s.room)
	}
}

// recheckRooms asks again about the subscriptions to some rooms, those of the app
// itself included: the rooms may not be tracked any more. It does not block.
func (w *watchers) recheckRooms(rooms []string) {
	for _, room := range rooms {
		w.mu.Lock()
		if !w.closed {
			for s := range w.byRoom[room] {
				w.recheckOne(s)
			}
		}
		w.mu.Unlock()
	}
}
