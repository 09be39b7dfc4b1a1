package mesh

// trackPresence puts a rule in force, also for entries, subscriptions and joins under way.
func (n *node) trackPresence(pattern Pattern, opts PresenceOptions) error {
	if err := n.rules.add(pattern, opts); err != nil {
		return err
	}
	n.obeyRule(pattern)
	return nil
}

// untrackPresence takes a rule out of force, also for entries, subscriptions and joins
// under way.
func (n *node) untrackPresence(pattern Pattern) bool {
	if !n.rules.remove(pattern) {
		return false
	}
	n.obeyRule(pattern)
	return true
}

// obeyRule has the rules asked again about the rooms that a rule is about, which
// has changed just now. Later joins and subscriptions ask the new rules.
func (n *node) obeyRule(p Pattern) {
	n.owner.Retime(p.among(n.owner.Rooms))
	n.watchers.recheckRooms(p.among(n.watchers.rooms))
}

// among returns those of some rooms that the pattern is about. A name is not
// looked for: that would cost as much as there are rooms.
func (p Pattern) among(rooms func() []string) []string {
	if p.kind == patternExact {
		return []string{p.exact}
	}
	var list []string
	for _, room := range rooms() {
		if p.re.MatchString(room) {
			list = append(list, room)
		}
	}
	return list
}
