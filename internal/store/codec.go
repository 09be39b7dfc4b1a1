package store

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
)

// errFormat is the error for data in Redis or on a channel that is not in this layout.
var errFormat = errors.New("store: not in this layout")

// A record is one line of fields, followed by the id of the user and by JSON:
//
//	entry incarnation ttl stateLength stateVersion flag metaVersion metaLength stateUntil joinedAt seq[ userLength grace extraLength[ until cause]] \n user extra meta state
//
// The numbers after seq are missing if they would all be 0. Only a kept place has until
// and cause. extra is for later versions, see lua/lib.lua.
//
// An event is
//
//	type epoch tag prev at cause[replaces][:userConnections:connections:users] conn <record>
//
// Both are written by Lua and only read by Go. lua/lib.lua explains the order of the
// fields.
const (
	recordFields = 11
	eventFields  = 7
)

// fields splits space-separated fields off the front of s, one for each element of
// into.
func fields(s string, into []string) (rest string, ok bool) {
	for i := range into {
		end := " "
		if i == recordFields-1 && len(into) == recordFields {
			end = "\n"
		}
		head, tail, found := strings.Cut(s, end)
		if !found || head == "" {
			return "", false
		}
		into[i], s = head, tail
	}
	return s, true
}

// parser parses numbers and keeps the first error.
type parser struct{ err error }

func (p *parser) uint(s string) uint64 {
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil && p.err == nil {
		p.err = err
	}
	return v
}

func (p *parser) int(s string) int64 { return int64(p.uint(s) & (1<<63 - 1)) }

// DecodeRecord decodes the value of one field of a room's hash.
func DecodeRecord(conn, s string) (Record, error) {
	var f [recordFields]string
	rest, ok := fields(s, f[:])
	if !ok {
		return Record{}, fmt.Errorf("record of %q: %w", conn, errFormat)
	}
	var p parser
	seq, tail, personal := strings.Cut(f[10], " ")
	r := Record{
		Conn:         conn,
		Entry:        f[0],
		Incarnation:  f[1],
		TTL:          time.Duration(p.int(f[2])) * time.Millisecond,
		StateVersion: p.uint(f[4]),
		StateSilent:  f[5] == "s",
		MetaVersion:  p.uint(f[6]),
		StateUntil:   p.int(f[8]),
		JoinedAt:     p.int(f[9]),
		Seq:          p.uint(seq),
	}
	state, meta := p.uint(f[3]), p.uint(f[7])
	if personal {
		rest, ok = r.decodePersonal(&p, tail, rest)
	}
	if size := uint64(len(rest)); !ok || p.err != nil || meta > size || state != size-meta {
		return Record{}, fmt.Errorf("record of %q: %w", conn, errFormat)
	}
	if meta > 0 {
		r.Meta = []byte(rest[:meta])
	}
	if state > 0 {
		r.State = []byte(rest[meta:])
	}
	return r, nil
}

// decodePersonal decodes the numbers after seq, and takes the user and the extra bytes
// off the front of the data.
func (r *Record) decodePersonal(p *parser, tail, data string) (rest string, ok bool) {
	f := strings.Split(tail, " ")
	switch {
	case len(f) == 5 && len(f[4]) == 1 && r.Kept():
		r.KeptUntil, r.KeptCause = p.int(f[3]), Cause(f[4][0])
	case len(f) != 3:
		return "", false
	}
	user, extra := p.uint(f[0]), p.uint(f[2])
	r.Grace = time.Duration(p.int(f[1])) * time.Millisecond
	if size := uint64(len(data)); p.err != nil || user > size || extra > size-user || len(f) == 5 && r.KeptUntil == 0 {
		return "", false
	}
	r.User = data[:user]
	return data[user+extra:], true
}

// DecodeEvent decodes one message of a room's channel.
func DecodeEvent(payload string) (Event, error) {
	var f [eventFields]string
	rest, ok := fields(payload, f[:])
	if !ok || len(f[0]) != 1 {
		return Event{}, fmt.Errorf("event: %w", errFormat)
	}
	switch EventType(f[0][0]) {
	case Joined, Replaced, Left, State, Meta, Disconnected:
	default:
		return Event{}, fmt.Errorf("event type %.20q: %w", f[0], errFormat)
	}
	var p parser
	e := Event{Type: EventType(f[0][0]), Epoch: f[1], Tag: f[2], Prev: f[3], At: p.int(f[4])}
	if e.decodeCause(&p, f[5]); p.err != nil {
		return Event{}, fmt.Errorf("event: %w", errFormat)
	}
	r, err := DecodeRecord(f[6], rest)
	if err != nil {
		return Event{}, err
	}
	e.Record = r
	return e, nil
}

// rebuild is the cause of a join that is a rebuild. Events without a cause have '.'.
const rebuild Cause = '='

// decodeCause decodes the cause of an event, with the connection and the numbers that
// may follow it.
func (e *Event) decodeCause(p *parser, s string) {
	e.Cause, s = Cause(s[0]), s[1:]
	if e.Cause == rebuild {
		e.Cause, e.Rebuild = '.', true
	}
	var numbers string
	if e.Replaces, numbers, e.Counted = strings.Cut(s, ":"); !e.Counted {
		return
	}
	f := strings.Split(numbers, ":")
	if len(f) != 3 {
		p.err = errFormat
		return
	}
	if f[0] != "" {
		e.UserConnections = int(p.int(f[0]))
	}
	e.Connections, e.Users = int(p.int(f[1])), int(p.int(f[2]))
}

// String returns the position as text: epoch, seq and tag.
func (p Position) String() string {
	return p.Epoch + " " + strconv.FormatUint(p.Seq, 10) + " " + p.Tag
}

// ParsePosition is the inverse of Position.String.
func ParsePosition(s string) (Position, error) { return decodePosition(s) }

// decodePosition decodes "epoch seq tag". The empty string is the zero Position. A
// position may go on with counts, see decodeCounts.
func decodePosition(s string) (Position, error) {
	if s == "" {
		return Position{}, nil
	}
	f := strings.SplitN(s, " ", 4)
	if len(f) < 3 {
		return Position{}, fmt.Errorf("position %.40q: %w", s, errFormat)
	}
	seq, err := strconv.ParseUint(f[1], 10, 64)
	if err != nil {
		return Position{}, fmt.Errorf("position %.40q: %w", s, errFormat)
	}
	return Position{Epoch: f[0], Seq: seq, Tag: f[2]}, nil
}

// numbersOf precedes the numbers of the room in a position.
const numbersOf = "*"

// count is one pair after a position: an incarnation with its number of entries.
type count struct {
	incarnation string // or NoOwner
	entries     string
}

// decodeCounts returns the counts that follow a position. numbers is the value of the
// pair that holds the room's numbers, see decodeNumbers; "" if there is none. ok is
// false if something else follows the position.
func decodeCounts(s string) (counts []count, numbers string, ok bool) {
	f := strings.Split(s, " ")
	if len(f) < 3 {
		return nil, "", true
	}
	f = f[3:]
	for ; len(f) >= 2; f = f[2:] {
		if f[0] == numbersOf {
			numbers = f[1]
			continue
		}
		counts = append(counts, count{f[0], f[1]})
	}
	return counts, numbers, len(f) == 0
}

// decodeOwners returns the incarnations that follow a position. Each has entries in the
// room.
func decodeOwners(s string) ([]string, error) {
	counts, _, ok := decodeCounts(s)
	if !ok {
		return nil, fmt.Errorf("position %.40q: %w", s, errFormat)
	}
	var owners []string
	for _, c := range counts {
		if c.incarnation != NoOwner {
			owners = append(owners, c.incarnation)
		}
	}
	return owners, nil
}

// decodeOwned decodes a member of an incarnation's index: "e conn entry room" or "c
// conn".
func decodeOwned(s string) (EntryRef, error) {
	if conn, ok := strings.CutPrefix(s, "c "); ok {
		return EntryRef{Conn: conn}, nil
	}
	f := strings.SplitN(s, " ", 4)
	if len(f) != 4 || f[0] != "e" {
		return EntryRef{}, fmt.Errorf("owned %.40q: %w", s, errFormat)
	}
	return EntryRef{Conn: f[1], Entry: f[2], Room: f[3]}, nil
}

// newTag returns a random mark for one write. Two histories with the same numbers
// differ in their tags.
func newTag() string { return strconv.FormatUint(rand.Uint64(), 36) }

func millis(d time.Duration) string {
	return strconv.FormatInt(d.Milliseconds(), 10)
}
