package mesh

import (
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"
)

const (
	// matchesKept is the least number of room names whose match results are kept,
	// once there are as many: regexps cost, names repeat.
	matchesKept = 4096
	// Results of names longer than longName are not kept: if Limits.RoomNameBytes is
	// off, the cache must not be large.
	longName = 1 << 10
	// namesRemoved and patternsRemoved are how many removed rules are remembered.
	// Patterns cost more: each is tried on every name whose result is not kept.
	namesRemoved, patternsRemoved = 4096, 16
)

// rule is the sum of all rules about one room. It must not be changed.
type rule struct {
	tracked    bool
	ttl        time.Duration
	interval   time.Duration // of states
	guards     []Guard       // every one must allow
	joinGuards []Guard       // every one must allow
	// guardRules and joinRules are the patterns of the rules that the guards are
	// of. Guards that hang are counted for each rule (see straysAll).
	guardRules, joinRules []string
	// version rises if a rule about the room is added, replaced or removed, and
	// otherwise only if many rules have been removed (see forgetRemoved).
	version uint64
}

// ruleSet holds the rules of a server. Adding or removing a name costs the same
// however many rules there are. Safe for concurrent use.
type ruleSet struct {
	mu       sync.RWMutex // guards the fields below, and what they point to
	changes  uint64       // how many there have been
	exact    map[string]addedRule
	patterns []patternRule // in the order they were first given; never changed in place
	floor    uint64        // no room's version is lower
	names    int           // removed ones in exact
	cache    matchCache
}

// addedRule is the options of one rule and the number of the change that brought
// it, or removed it. A removed rule says nothing but that number: the version of
// the rooms that it was about must not go back to one that they had before.
type addedRule struct {
	opts    PresenceOptions
	since   uint64
	removed bool
}

type patternRule struct {
	re *regexp.Regexp
	addedRule
}

// add puts a rule in force. The same exact name given again replaces what was
// given before, and so does the same expression, in its old place: set-up code
// may run twice.
func (s *ruleSet) add(p Pattern, o PresenceOptions) error {
	if err := p.validate(); err != nil {
		return err
	}
	if err := o.validate(); err != nil {
		return fmt.Errorf("%w (pattern %v)", err, p)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes++
	a := addedRule{opts: o, since: s.changes}
	if p.kind == patternRegexp {
		s.addPattern(patternRule{p.re, a})
		return nil
	}
	if s.exact[p.exact].removed {
		s.names--
	}
	s.setExact(p.exact, a)
	return nil
}

func (s *ruleSet) setExact(name string, a addedRule) {
	if s.exact == nil {
		s.exact = make(map[string]addedRule)
	}
	s.exact[name] = a
	s.cache.forget(name)
}

// addPattern puts r in the place of the rule of the same expression, or last.
func (s *ruleSet) addPattern(r patternRule) {
	i := s.find(r.re)
	switch {
	case i < 0:
		s.patterns = append(s.patterns, r) // beyond the end of what others read
	case s.patterns[i].removed:
		s.patterns = append(slices.Delete(slices.Clone(s.patterns), i, i+1), r)
	default:
		s.setPattern(i, r)
	}
	s.cache.clear()
}

func (s *ruleSet) setPattern(i int, r patternRule) {
	s.patterns = slices.Clone(s.patterns)
	s.patterns[i] = r
}

func (s *ruleSet) find(re *regexp.Regexp) int {
	expr := re.String()
	return slices.IndexFunc(s.patterns, func(r patternRule) bool { return r.re.String() == expr })
}

// remove takes a rule out of force; false: there is none of that pattern.
func (s *ruleSet) remove(p Pattern) bool {
	if p.validate() != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := addedRule{since: s.changes + 1, removed: true}
	if p.kind == patternRegexp {
		i := s.find(p.re)
		if i < 0 || s.patterns[i].removed {
			return false
		}
		s.setPattern(i, patternRule{s.patterns[i].re, gone})
		s.cache.clear()
	} else {
		a, ok := s.exact[p.exact]
		if !ok || a.removed {
			return false
		}
		s.setExact(p.exact, gone)
		s.names++
	}
	s.changes++
	s.forgetRemoved()
	return true
}

// forgetRemoved drops the removed rules if there are many. All versions rise then,
// so that each guard is asked again when its verdict is needed next.
func (s *ruleSet) forgetRemoved() {
	dead := func(r patternRule) bool { return r.removed }
	patterns := slices.DeleteFunc(slices.Clone(s.patterns), dead)
	if s.names <= namesRemoved && len(s.patterns)-len(patterns) <= patternsRemoved {
		return
	}
	s.patterns = patterns
	for name, a := range s.exact {
		if a.removed {
			delete(s.exact, name)
		}
	}
	s.names, s.floor = 0, s.changes
	s.cache.clear()
}

// match returns the rule of a room: the zero rule (not tracked), or the
// guards of every rule that matches it, and the TTL and StateInterval of the exact
// one if there is one (even if they are 0), else of the pattern that was given
// first.
func (s *ruleSet) match(room string) rule {
	s.mu.RLock()
	r, young, kept := s.cache.get(room)
	if young {
		s.mu.RUnlock()
		return r
	}
	exact, patterns := s.exact[room], s.patterns
	floor, changes := s.floor, s.changes
	s.mu.RUnlock()
	if !kept {
		r = evaluate(room, exact, patterns, floor)
	}
	if len(room) >= longName {
		return r
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changes == changes { // otherwise r may be out of date already
		s.cache.put(room, r)
	}
	return r
}

// evaluate asks every pattern.
func evaluate(room string, exact addedRule, patterns []patternRule, floor uint64) rule {
	r := rule{version: floor}
	if exact.since > 0 {
		r.include(Exact(room), exact)
	}
	for _, p := range patterns {
		if p.re.MatchString(room) {
			r.include(Regexp(p.re), p.addedRule)
		}
	}
	return r
}

// include adds what one more rule says, one that ranks lower than those
// included before.
func (r *rule) include(p Pattern, a addedRule) {
	r.version = max(r.version, a.since)
	if a.removed {
		return
	}
	if !r.tracked {
		r.tracked, r.ttl, r.interval = true, a.opts.TTL, a.opts.StateInterval
	}
	if a.opts.Guard != nil {
		r.guards, r.guardRules = append(r.guards, a.opts.Guard), append(r.guardRules, p.String())
	}
	if a.opts.JoinGuard != nil {
		r.joinGuards, r.joinRules = append(r.joinGuards, a.opts.JoinGuard), append(r.joinRules, p.String())
	}
}

// matchCache keeps match results in two generations: when the young one is
// full it becomes the old one, and results that are asked for again move back. So
// results in use stay, others go, and made-up room names cannot fill the memory.
type matchCache struct{ young, old map[string]rule }

// get returns what is kept of a room; young: it need not be put again.
func (c *matchCache) get(room string) (r rule, young, kept bool) {
	if r, young = c.young[room]; young {
		return r, true, true
	}
	r, kept = c.old[room]
	return r, false, kept
}

func (c *matchCache) put(room string, r rule) {
	if len(c.young) >= matchesKept {
		c.old, c.young = c.young, nil
	}
	if c.young == nil {
		c.young = make(map[string]rule)
	}
	c.young[room] = r
}

func (c *matchCache) forget(room string) {
	delete(c.young, room)
	delete(c.old, room)
}

func (c *matchCache) clear() { c.young, c.old = nil, nil }
