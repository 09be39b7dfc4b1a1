package guards

import (
	"regexp"
	"slices"
	"sync"
	"time"
)

const (
	// matchesKept is the number of room names whose match results are kept at least.
	// Regular expressions cost time, and names repeat.
	matchesKept = 4096
	// longName limits the length of the names whose results are kept, because
	// Limits.RoomNameBytes may be off.
	longName = 1 << 10
	// namesRemoved and patternsRemoved limit how many removed rules are remembered.
	// Patterns cost more: each is tried on every name without a kept result.
	namesRemoved, patternsRemoved = 4096, 16
)

// Rule is the sum of all rules about one room. It must not be changed.
type Rule struct {
	Tracked       bool // there is a rule
	TTL           time.Duration
	StateInterval time.Duration
	Grace         time.Duration
	// MaxConnections and MaxUsers bound the members and the users. 0: no bound.
	MaxConnections, MaxUsers int

	guards     []Func // every one must allow
	joinGuards []Func // every one must allow
	// occupancyGuards are those of the questions about numbers, if ownOccupancy is true.
	// Otherwise no rule has an OccupancyGuard, and guards decide.
	occupancyGuards []Func
	ownOccupancy    bool
	// guardRules, joinRules and occupancyRules are the patterns of the rules that the
	// guards belong to. Guards that hang are counted for each rule (see
	// maxHangingPerRule).
	guardRules, joinRules, occupancyRules []string

	// OccupancyInterval is the shortest time between two updates of the numbers. 0: the
	// default.
	OccupancyInterval time.Duration
	// version rises if a rule about the room is added, replaced or removed. Otherwise it
	// rises only if many rules have been removed (see forgetRemoved).
	version uint64
}

// RuleSet holds the rules of a server. The cost of adding or removing a name does not
// depend on the number of rules. The zero RuleSet is empty and ready to use. A RuleSet is
// safe for concurrent use.
type RuleSet struct {
	mu       sync.RWMutex // guards the fields below, and the values behind them
	changes  uint64       // number of changes so far
	exact    map[string]addedRule
	patterns []patternRule // in the order they were first given; never changed in place
	floor    uint64        // least version of all rooms
	names    int           // removed ones in exact
	cache    matchCache
}

// addedRule holds the options of one rule and the number of the change that added or
// removed it. Of a removed rule only that number counts: the version of its rooms must not
// go back to an earlier one.
type addedRule struct {
	opts    Options
	since   uint64
	removed bool
}

type patternRule struct {
	re *regexp.Regexp
	addedRule
}

// Add puts a rule in force. It replaces the rule of the same exact name. It replaces the
// rule of the same expression too, in its old place. Set-up code may run twice.
func (s *RuleSet) Add(p Pattern, o Options) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes++
	a := addedRule{opts: o, since: s.changes}
	if p.Regexp != nil {
		s.addPattern(patternRule{p.Regexp, a})
		return
	}
	if s.exact[p.Exact].removed {
		s.names--
	}
	s.setExact(p.Exact, a)
}

func (s *RuleSet) setExact(name string, a addedRule) {
	if s.exact == nil {
		s.exact = make(map[string]addedRule)
	}
	s.exact[name] = a
	s.cache.forget(name)
}

// addPattern puts r in place of the rule of the same expression, or at the end.
func (s *RuleSet) addPattern(r patternRule) {
	i := s.find(r.re)
	switch {
	case i < 0:
		s.patterns = append(s.patterns, r) // others read only up to the old end
	case s.patterns[i].removed:
		s.patterns = append(slices.Delete(slices.Clone(s.patterns), i, i+1), r)
	default:
		s.setPattern(i, r)
	}
	s.cache.clear()
}

func (s *RuleSet) setPattern(i int, r patternRule) {
	s.patterns = slices.Clone(s.patterns)
	s.patterns[i] = r
}

func (s *RuleSet) find(re *regexp.Regexp) int {
	expr := re.String()
	return slices.IndexFunc(s.patterns, func(r patternRule) bool { return r.re.String() == expr })
}

// Remove takes the rule of a pattern out of force. It returns false if there is none.
func (s *RuleSet) Remove(p Pattern) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := addedRule{since: s.changes + 1, removed: true}
	if p.Regexp != nil {
		i := s.find(p.Regexp)
		if i < 0 || s.patterns[i].removed {
			return false
		}
		s.setPattern(i, patternRule{s.patterns[i].re, gone})
		s.cache.clear()
	} else {
		a, ok := s.exact[p.Exact]
		if !ok || a.removed {
			return false
		}
		s.setExact(p.Exact, gone)
		s.names++
	}
	s.changes++
	s.forgetRemoved()
	return true
}

// forgetRemoved drops the removed rules if there are many. All versions rise then, so each
// guard is asked again when its answer is needed next.
func (s *RuleSet) forgetRemoved() {
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

// Match returns the rule of a room: the zero Rule if no rule matches it. Otherwise it has
// the guards of every rule that matches. All other settings are those of the rule of the
// exact name, even if they are 0. If there is none, they are those of the pattern that was
// given first.
func (s *RuleSet) Match(room string) Rule {
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
	if s.changes == changes { // otherwise r may be out of date
		s.cache.put(room, r)
	}
	return r
}

// Hidden returns the first rule of an exact name, and a pattern that matches the name, of
// which the pattern has a grace or a cap and the rule of the name has none. more is the
// number of further such rules.
func (s *RuleSet) Hidden() (name, pattern string, more int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var bounding []patternRule
	for _, p := range s.patterns {
		if !p.removed && p.opts.bounds() {
			bounding = append(bounding, p)
		}
	}
	if len(bounding) == 0 {
		return "", "", 0
	}
	for exact, a := range s.exact {
		if a.removed || a.opts.bounds() {
			continue
		}
		for _, p := range bounding {
			if !p.re.MatchString(exact) {
				continue
			}
			if name != "" {
				more++
			}
			if name == "" || exact < name {
				name, pattern = exact, p.re.String()
			}
			break
		}
	}
	return name, pattern, more
}

// evaluate tries every pattern on a room.
func evaluate(room string, exact addedRule, patterns []patternRule, floor uint64) Rule {
	r := Rule{version: floor}
	if exact.since > 0 {
		r.include(Pattern{Exact: room}, exact)
	}
	for _, p := range patterns {
		if p.re.MatchString(room) {
			r.include(Pattern{Regexp: p.re}, p.addedRule)
		}
	}
	return r
}

// include adds one more rule, which ranks lower than those included before.
func (r *Rule) include(p Pattern, a addedRule) {
	r.version = max(r.version, a.since)
	if a.removed {
		return
	}
	if !r.Tracked {
		r.Tracked, r.TTL, r.StateInterval, r.Grace = true, a.opts.TTL, a.opts.StateInterval, a.opts.Grace
		r.MaxConnections, r.MaxUsers = a.opts.MaxConnections, a.opts.MaxUsers
		r.OccupancyInterval = a.opts.OccupancyInterval
	}
	r.includeOccupancy(p, a.opts)
	if a.opts.Guard != nil {
		r.guards, r.guardRules = append(r.guards, a.opts.Guard), append(r.guardRules, p.String())
	}
	if a.opts.JoinGuard != nil {
		r.joinGuards, r.joinRules = append(r.joinGuards, a.opts.JoinGuard), append(r.joinRules, p.String())
	}
}

// includeOccupancy adds the guard of the numbers. It is called before the Guard of the same
// rule is added.
func (r *Rule) includeOccupancy(p Pattern, o Options) {
	guard, own := o.OccupancyGuard, o.OccupancyGuard != nil || o.OccupancyOpen
	switch {
	case !own && !r.ownOccupancy:
		return
	case !own:
		guard = o.Guard
	case !r.ownOccupancy:
		r.ownOccupancy = true
		r.occupancyGuards, r.occupancyRules = slices.Clone(r.guards), slices.Clone(r.guardRules)
	}
	if guard != nil {
		r.occupancyGuards, r.occupancyRules = append(r.occupancyGuards, guard), append(r.occupancyRules, p.String())
	}
}

// matchCache keeps match results in two generations. When the young one is full, it
// becomes the old one, and results that are used again move back. So results in use stay,
// others go, and made-up room names cannot fill the memory.
type matchCache struct{ young, old map[string]Rule }

// get returns the kept result of a room. If young is true, it need not be put again.
func (c *matchCache) get(room string) (r Rule, young, kept bool) {
	if r, young = c.young[room]; young {
		return r, true, true
	}
	r, kept = c.old[room]
	return r, false, kept
}

func (c *matchCache) put(room string, r Rule) {
	if len(c.young) >= matchesKept {
		c.old, c.young = c.young, nil
	}
	if c.young == nil {
		c.young = make(map[string]Rule)
	}
	c.young[room] = r
}

func (c *matchCache) forget(room string) {
	delete(c.young, room)
	delete(c.old, room)
}

func (c *matchCache) clear() { c.young, c.old = nil, nil }
