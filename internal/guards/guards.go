// Package guards decides which connections may see a room and which may be in it.
//
// A RuleSet holds the rules of a server. A Cache asks the guards of the rules and keeps
// their answers. Joins asks the join guards, whose answers are not kept, and lets other
// decisions about the same connection and room override theirs.
package guards

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/wire"
)

// Member is a connection as guards see it.
type Member struct {
	ID       string
	UserID   string // empty: none
	Metadata json.RawMessage
}

// MemberFunc returns a connection as it is now, and the version of its metadata, which
// changes with every change of the metadata. It must not block.
type MemberFunc func() (m Member, version uint64)

// Func is a guard or a join guard.
type Func func(ctx context.Context, m Member, room string) (bool, error)

// Pattern says which rooms a rule is about: the room of that exact name, or, if Regexp is
// not nil, all rooms whose name it matches.
type Pattern struct {
	Exact  string
	Regexp *regexp.Regexp
}

// String returns the name, quoted, or the expression between slashes.
func (p Pattern) String() string {
	if p.Regexp != nil {
		return "/" + p.Regexp.String() + "/"
	}
	return fmt.Sprintf("%q", p.Exact)
}

// Among returns those of the rooms that the pattern is about. It does not look for an
// exact name, because that would cost as much as there are rooms.
func (p Pattern) Among(rooms func() []string) []string {
	if p.Regexp == nil {
		return []string{p.Exact}
	}
	var list []string
	for _, room := range rooms() {
		if p.Regexp.MatchString(room) {
			list = append(list, room)
		}
	}
	return list
}

// Options are the options of one rule.
type Options struct {
	TTL           time.Duration
	StateInterval time.Duration
	Grace         time.Duration // 0: no place is kept
	// MaxConnections and MaxUsers bound the members and the users. 0: no bound.
	MaxConnections, MaxUsers int

	Guard     Func // nil: every connection may see the room
	JoinGuard Func // nil: every connection may be in the room

	OccupancyGuard    Func          // decides who may know the numbers; nil: Guard
	OccupancyOpen     bool          // instead of OccupancyGuard: everyone may know them
	OccupancyInterval time.Duration // 0: the default
}

// bounds reports whether the rule keeps places or has a cap.
func (o Options) bounds() bool { return o.Grace > 0 || o.MaxConnections > 0 || o.MaxUsers > 0 }

// NotTracked returns the error for a room without a rule.
func NotTracked(room string) error { return fmt.Errorf("%w: %s", errs.NotTracked, wire.Quote(room)) }
