package mesh

import (
	"context"
	"fmt"
	"reflect"
	"regexp"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/meshpresence/mesh/internal/guards"
)

const (
	// minTTL and maxTTL are the bounds of PresenceOptions.TTL, apart from 0.
	minTTL = time.Second
	maxTTL = 365 * 24 * time.Hour
	// minStateInterval and maxStateInterval are the bounds of
	// PresenceOptions.StateInterval, apart from 0.
	minStateInterval = 10 * time.Millisecond
	maxStateInterval = time.Minute
	// minGrace and maxGrace are the bounds of PresenceOptions.Grace, apart from 0.
	minGrace = time.Second
	maxGrace = 10 * time.Minute
	// minOccupancyInterval and maxOccupancyInterval are the bounds of
	// PresenceOptions.OccupancyInterval, apart from 0.
	minOccupancyInterval = 100 * time.Millisecond
	maxOccupancyInterval = time.Minute
)

// Pattern selects the rooms of a rule: the room with an exact name, or all rooms whose
// name matches a regular expression. Create one with Exact or Regexp. The zero Pattern
// matches nothing and is rejected. A Pattern is immutable.
type Pattern struct {
	kind  patternKind
	exact string
	re    *regexp.Regexp
}

type patternKind byte

const (
	patternExact patternKind = iota + 1
	patternRegexp
)

// Exact returns the Pattern of the one room with that name.
func Exact(name string) Pattern { return Pattern{kind: patternExact, exact: name} }

// Regexp returns the Pattern of all rooms whose name re matches, as re.MatchString
// does: anywhere in the name, unless ^ and $ say otherwise. So
// Regexp(regexp.MustCompile("admin")) also matches the room "not-admin-at-all", and
// ^admin-[0-9]+$ matches admin rooms only.
func Regexp(re *regexp.Regexp) Pattern { return Pattern{kind: patternRegexp, re: re} }

// String returns the name, quoted, or the expression between slashes.
func (p Pattern) String() string {
	if p.kind == 0 || p.kind == patternRegexp && p.re == nil {
		return "(no pattern)"
	}
	return p.inner().String()
}

// inner converts the pattern for package guards.
func (p Pattern) inner() guards.Pattern { return guards.Pattern{Exact: p.exact, Regexp: p.re} }

// validate returns an error that wraps ErrInvalidPattern if the pattern is invalid.
func (p Pattern) validate() error {
	switch {
	case p.kind == patternRegexp && p.re == nil:
		return fmt.Errorf("%w: Regexp of a nil *regexp.Regexp", ErrInvalidPattern)
	case p.kind == patternRegexp:
		return nil
	case p.kind != patternExact:
		return fmt.Errorf("%w: the zero Pattern; use Exact or Regexp", ErrInvalidPattern)
	case p.exact == "":
		return fmt.Errorf("%w: Exact of an empty name", ErrInvalidPattern)
	case !utf8.ValidString(p.exact):
		return fmt.Errorf("%w: %q is not valid UTF-8", ErrInvalidPattern, p.exact)
	}
	for _, r := range p.exact {
		if unicode.IsControl(r) {
			return fmt.Errorf("%w: %q holds a control character", ErrInvalidPattern, p.exact)
		}
	}
	return nil
}

// Guard decides whether a connection may do something with a room. m holds a copy of
// the connection's id and current metadata. An error, a panic, or no answer within the
// time limit refuses.
//
// Guards of different connections and rooms run at the same time, so a Guard must be
// safe for concurrent use. It should return when ctx ends.
type Guard func(ctx context.Context, m Member, room string) (bool, error)

// inner converts the guard for package guards. It returns nil for nil.
func (g Guard) inner() guards.Func {
	if g == nil {
		return nil
	}
	return func(ctx context.Context, m guards.Member, room string) (bool, error) {
		return g(ctx, Member{ID: m.ID, UserID: m.UserID, Metadata: m.Metadata}, room)
	}
}

// Everyone is a Guard that allows everything. As an OccupancyGuard it is never called.
func Everyone(context.Context, Member, string) (bool, error) { return true, nil }

// isEveryone reports whether the guard is Everyone. Functions cannot be compared, but
// their code can.
func (g Guard) isEveryone() bool {
	return g != nil && reflect.ValueOf(g).Pointer() == reflect.ValueOf(Everyone).Pointer()
}

// PresenceOptions are the options of one rule, given to [Server.TrackPresence]. With
// the zero value every connection may see and join the room, and silence ends no entry.
type PresenceOptions struct {
	// TTL is the time for which a connection stays present without a frame from it (or,
	// with a transport of your own, without a Touch). The entry ends within a second
	// after TTL. At least 1 s and at most 365 days. Defaults to 0: silence alone ends
	// nothing.
	TTL time.Duration
	// StateInterval limits how often the states of one member are delivered: at most
	// one per interval. It is for states that change fast and of which only the current
	// one counts, such as cursors. The newest state wins. The last state is always
	// delivered, at the end of the interval or up to 60 ms later (states of several
	// members are written together). Clearing counts as a state, and so does a silent
	// state.
	//
	// The first state after a pause is delivered at once. So is the end of a state by
	// its ExpireAfter, which counts from the time of publishing. A state that has to
	// wait is answered when it has been written. It ends with its entry. If a newer
	// state supersedes it before, it is never delivered (see StatesSuperseded of
	// [Stats]). While Redis is unavailable, it is answered with [ErrUnavailable], as
	// all states are. From 10 ms to a minute. Defaults to 0: every state is delivered.
	StateInterval time.Duration
	// Grace keeps the place of a user whose last connection in the room has ended without
	// asking to leave: its socket closed or broke, it was silent for its TTL, or its
	// server shut down or died. Until Grace is over, the member stays in the room,
	// disconnected and without a state. It counts for all numbers and caps. If the user
	// joins again on any server, the new connection takes the place, and subscribers do
	// not see that the user left. Otherwise the member leaves when Grace is over, within a
	// second, or within LeaseTTL + 1 s if a server has just started or had trouble with
	// Redis. If the server of the connection was killed, Grace counts from the end of its
	// lease, and the member leaves within LeaseTTL/3 + 1 s after Grace.
	//
	// A connection leaves at once if it asks to leave, if the app removes or closes it, or
	// if it broke the protocol (close codes 1002, 1008 and 1009), and also if its user has
	// another connection in the room. From 1 s to 10 minutes. It requires Options.UserID,
	// and has no effect on connections without a user. Defaults to 0: no place is kept.
	Grace time.Duration
	// MaxConnections bounds the number of members, including disconnected ones. A join
	// beyond it is refused with [ErrFull], for clients with the code EFULL. The JoinGuard
	// is asked before. Redis itself counts, so that the bound holds for joins at the same
	// moment on all servers. If the rule gets a lower bound, members stay. Defaults to 0:
	// no bound.
	MaxConnections int
	// MaxUsers bounds the number of users in the same way. A further connection of a user
	// who is in the room is no further user. A connection without a user counts as one.
	// It requires Options.UserID. Defaults to 0: no bound.
	MaxUsers int
	// Guard decides which connections may see the room: subscribe to it, get its
	// members in the answer to a join, read its states, and publish a state in it.
	//
	// The answer is cached. The guard is asked again if the connection's metadata or
	// the rules change, after RoomManager.Remove, Clear, Delete and Recheck, after
	// ConnectionManager.Recheck, and if a client makes a request and the answer is
	// older than 5 s. A failure is cached for a second. A refusal ends the connection's
	// subscription to the room. So does a failure, unless the guard was asked because
	// of a request: then only the request is refused.
	//
	// All guards that are asked the same question share one Options.GuardTimeout. If
	// metadata or rules keep changing while the guards run, the connection is refused
	// after that time.
	//
	// If 1,024 calls of the guards of one rule hang (16 for one connection, 32,768 for
	// all rules), the rule's guards are not called until one of the calls returns. A
	// connection that was allowed before stays allowed until then, and other
	// connections are refused. If something has changed since the cached answer, events
	// and requests wait for up to a second before the answer is used. A single hanging
	// call counts as a refusal, and its question is not asked again before it returns,
	// unless metadata or rules change or Recheck, Remove, Clear or Delete is called.
	//
	// A refused connection may still join, unless JoinGuard refuses it. It is then in
	// the room and visible to the others. It sees nothing of the room, except messages
	// that the app sends with RoomManager.Send. Defaults to nil: every connection is
	// allowed.
	Guard Guard
	// JoinGuard decides which connections may be in the room. It is called at each join
	// of a client or by PresenceManager.Join. It is also called if a member whose entry
	// has ended comes back with its next frame, because the member was silent for its
	// TTL or its server stalled past its lease. If it refuses such a member, the member
	// stays out and its socket gets the push mesh/membership-ended. It is not called by
	// RoomManager.Add, nor if a server only writes entries again that have not ended:
	// after Redis lost data, or after the server was cut off from Redis.
	//
	// RoomManager.Recheck and ConnectionManager.Recheck call it for members. A member
	// that it refuses then leaves, as does a member that joins again and is refused.
	// Other changes do not call it, so a member stays in until then.
	//
	// It is limited by Options.HookTimeout. If metadata or matching rules change during
	// the call, it is called again within that time. Hanging calls are limited as those
	// of Guard. Defaults to nil: every connection is allowed.
	JoinGuard Guard
	// OccupancyGuard decides which connections may know the numbers of the room (see
	// [PresenceManager.SubscribeOccupancy]) and nothing else of it. It is asked and its
	// answer is kept as those of Guard. If it refuses, the connection's subscription to
	// the numbers ends. [Everyone] opens the numbers of a room whose members only some
	// may see. Defaults to nil: the rule's Guard decides.
	OccupancyGuard Guard
	// OccupancyInterval is the shortest time between two updates of the numbers of a
	// room. Numbers that change in between are left out, and the last ones are always
	// sent. From 100 ms to a minute. Defaults to 1 s.
	OccupancyInterval time.Duration
}

// validate returns an error that wraps ErrInvalidOptions if an option is invalid. users
// says that there are users.
func (o PresenceOptions) validate(users bool) error {
	if o.TTL != 0 && (o.TTL < minTTL || o.TTL > maxTTL) {
		return fmt.Errorf("%w: PresenceOptions.TTL is %v, want 0 or %v to %v", ErrInvalidOptions, o.TTL, minTTL, maxTTL)
	}
	if o.StateInterval != 0 && (o.StateInterval < minStateInterval || o.StateInterval > maxStateInterval) {
		return fmt.Errorf("%w: PresenceOptions.StateInterval is %v, want 0 or %v to %v",
			ErrInvalidOptions, o.StateInterval, minStateInterval, maxStateInterval)
	}
	if d := o.OccupancyInterval; d != 0 && (d < minOccupancyInterval || d > maxOccupancyInterval) {
		return fmt.Errorf("%w: PresenceOptions.OccupancyInterval is %v, want 0 or %v to %v",
			ErrInvalidOptions, d, minOccupancyInterval, maxOccupancyInterval)
	}
	if o.Grace != 0 && (o.Grace < minGrace || o.Grace > maxGrace) {
		return fmt.Errorf("%w: PresenceOptions.Grace is %v, want 0 or %v to %v", ErrInvalidOptions, o.Grace, minGrace, maxGrace)
	}
	for _, n := range []struct {
		field string
		value int
	}{{"MaxConnections", o.MaxConnections}, {"MaxUsers", o.MaxUsers}} {
		if n.value < 0 || n.value > maxCount {
			return fmt.Errorf("%w: PresenceOptions.%s is %d, want 0 to %d", ErrInvalidOptions, n.field, n.value, maxCount)
		}
	}
	switch {
	case users:
	case o.Grace != 0:
		return fmt.Errorf("%w: PresenceOptions.Grace requires Options.UserID", ErrInvalidOptions)
	case o.MaxUsers != 0:
		return fmt.Errorf("%w: PresenceOptions.MaxUsers requires Options.UserID", ErrInvalidOptions)
	}
	return nil
}

// inner returns the options for package guards.
func (o PresenceOptions) inner() guards.Options {
	inner := guards.Options{
		TTL: o.TTL, StateInterval: o.StateInterval, Grace: o.Grace, MaxConnections: o.MaxConnections, MaxUsers: o.MaxUsers,
		Guard: o.Guard.inner(), JoinGuard: o.JoinGuard.inner(),
		OccupancyGuard: o.OccupancyGuard.inner(), OccupancyInterval: o.OccupancyInterval,
	}
	if o.OccupancyGuard.isEveryone() {
		inner.OccupancyGuard, inner.OccupancyOpen = nil, true
	}
	return inner
}
