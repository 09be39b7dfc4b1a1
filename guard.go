package mesh

import (
	"context"
	"fmt"
	"regexp"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// minTTL and maxTTL are the ends of what PresenceOptions.TTL may be,
	// apart from 0.
	minTTL = time.Second
	maxTTL = 365 * 24 * time.Hour
	// minStateInterval and maxStateInterval are those of
	// PresenceOptions.StateInterval, apart from 0.
	minStateInterval = 10 * time.Millisecond
	maxStateInterval = time.Minute
)

// Pattern says which rooms a rule is about: the one of an exact name, or all
// whose name a regular expression matches. Make one with Exact or Regexp; the
// zero Pattern matches nothing and is refused. A Pattern is immutable.
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

// Exact returns the Pattern of the one room of that name.
func Exact(name string) Pattern { return Pattern{kind: patternExact, exact: name} }

// Regexp returns the Pattern of all rooms whose name re matches, as
// re.MatchString does: anywhere in the name, unless ^ and $ say otherwise. So
// Regexp(regexp.MustCompile("admin")) is about the room "not-admin-at-all" too,
// and ^admin-[0-9]+$ is about admin rooms only.
func Regexp(re *regexp.Regexp) Pattern { return Pattern{kind: patternRegexp, re: re} }

// String returns the name, quoted, or the expression between slashes.
func (p Pattern) String() string {
	switch {
	case p.kind == patternExact:
		return fmt.Sprintf("%q", p.exact)
	case p.kind == patternRegexp && p.re != nil:
		return "/" + p.re.String() + "/"
	default:
		return "(no pattern)"
	}
}

// validate returns what is wrong with the pattern, wrapping ErrInvalidPattern.
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

// Guard decides whether a connection may do something with a room. It gets a
// copy of the connection's id and current metadata. An error, a panic, or no
// answer within its time limit refuses.
//
// Guards of different connections and rooms run at the same time, so a Guard
// must be safe for concurrent use; and it should end when ctx does.
type Guard func(ctx context.Context, m Member, room string) (bool, error)

// PresenceOptions are the options of one rule, given to [Server.TrackPresence].
// The zero value: everyone may see and join, and silence ends nothing.
type PresenceOptions struct {
	// TTL is how long a connection stays present without a frame from it (or,
	// with a transport of your own, without a Touch). It ends within a second
	// after TTL. At least 1 s and at most 365 days. Defaults to 0: silence
	// alone ends nothing.
	TTL time.Duration
	// StateInterval tells of the states of one member at most one in that time,
	// for what changes fast and only counts as it is now, as cursors do: the
	// newest wins, and the last is always told, when the interval is over or up
	// to 60 ms later (those of several members go together). Clearing counts as a
	// state, a silent state too. The first one after a pause is told at once; so
	// is that a state has ended by its ExpireAfter, which counts from when it was
	// published. A state that has to wait is answered when it has been taken: it
	// ends with its entry, and one that a newer one supersedes meanwhile is never
	// told (see StatesSuperseded of [Stats]). While Redis is away it is answered
	// with [ErrUnavailable], as all are. From 10 ms to a minute. Defaults to 0:
	// every state is told.
	StateInterval time.Duration
	// Guard decides which connections may see the room: subscribe to it, get its
	// members in the answer to a join, read its states, and publish a state in it.
	//
	// Its verdict is kept, and asked for again if the connection's metadata or the
	// rules change, after RoomManager.Remove, Clear, Delete and Recheck, after
	// ConnectionManager.Recheck, and if a client makes a request when the verdict is
	// older than 5 s. A failure is kept for a second. A no ends the connection's
	// subscription to the room. A failure does so, too, unless a request was the reason
	// to ask: then only the request is refused.
	//
	// All guards that are asked the same question have Options.GuardTimeout
	// together. If metadata or rules keep changing while they are asked, the answer
	// is no after that time. If 1,024 calls of the guards of one rule hang (16 for one
	// connection; 32,768 of all rules), that rule's guards are not asked until one of
	// them returns: a connection that had a yes keeps it until then, others are
	// refused. If something has changed since that yes, events and requests wait for
	// up to a second before it is relied on. A single call that hangs is a no, and its
	// question is not asked again before it returns, unless metadata or rules change
	// or Recheck, Remove, Clear or Delete is called.
	//
	// A refused connection may still join, unless JoinGuard says otherwise: it is in
	// the room, the others see it, it sees nothing, and it gets what the app sends
	// by RoomManager.Send. Defaults to nil: every connection is allowed.
	Guard Guard
	// JoinGuard decides which connections may be in the room. It is asked at each
	// join of a client or of PresenceManager.Join, and if a member whose entry has
	// ended comes back by its next frame: it was silent for its TTL, or its server
	// stood still past its lease. If it refuses such a member, the member stays out
	// and its socket gets the push mesh/membership-ended. It is not asked by
	// RoomManager.Add, nor if a server only writes entries again that have not ended:
	// after Redis lost data, or after the server was cut off from Redis.
	//
	// RoomManager.Recheck and ConnectionManager.Recheck ask it about members: a
	// member that it refuses leaves, as one does that joins again and is refused.
	// Other changes do not, so a member stays in until then.
	//
	// It is limited by Options.HookTimeout. If metadata or matching rules change
	// while it is asked, it is asked again within that time. Hanging calls are
	// limited as those of Guard. Defaults to nil: every connection is allowed.
	JoinGuard Guard
}

// validate returns what is wrong with the options, wrapping ErrInvalidOptions.
func (o PresenceOptions) validate() error {
	if o.TTL != 0 && (o.TTL < minTTL || o.TTL > maxTTL) {
		return fmt.Errorf("%w: PresenceOptions.TTL is %v, want 0 or %v to %v", ErrInvalidOptions, o.TTL, minTTL, maxTTL)
	}
	if o.StateInterval != 0 && (o.StateInterval < minStateInterval || o.StateInterval > maxStateInterval) {
		return fmt.Errorf("%w: PresenceOptions.StateInterval is %v, want 0 or %v to %v",
			ErrInvalidOptions, o.StateInterval, minStateInterval, maxStateInterval)
	}
	return nil
}
