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

// A record is one line of fields, followed by the user and the JSON of the users:
//
//	entry incarnation ttl stateLength stateVersion flag metaVersion metaLength stateUntil joinedAt seq \n meta state
//
// If it has a user, a grace period or something extra, which readers skip, the line goes
// on after seq, and if the place is kept, still further:
//
//	… seq userLength grace extraLength \n user extra meta state
//	… seq userLength grace extraLength keptUntil keptCause \n user extra meta state
//
// An event is
//
//	type epoch tag prev at cause conn <record>
//
// The cause of a join that took a place is '.' and the connection that had it. Both are written by Lua and only read by Go. lua/lib.lua explains the order of the
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
	}
	seq, more, _ := strings.Cut(f[10], " ")
	r.Seq = p.uint(seq)
	if len(seq) < len(f[10]) {
		if rest, ok = r.decodeMore(more, rest); !ok {
			return Record{}, fmt.Errorf("record of %q: %w", conn, errFormat)
		}
	}
	state, meta := p.uint(f[3]), p.uint(f[7])
	if size := uint64(len(rest)); p.err != nil || meta > size || state != size-meta {
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

// decodeMore decodes the fields after seq, and the user. It returns the metadata and the
// state.
func (r *Record) decodeMore(line, rest string) (string, bool) {
	f := strings.Split(line, " ")
	if len(f) != 3 && (len(f) != 5 || len(f[4]) != 1) {
		return "", false
	}
	var p parser
	user, extra := p.uint(f[0]), p.uint(f[2])
	r.Grace = time.Duration(p.int(f[1])) * time.Millisecond
	if len(f) == 5 {
		r.KeptUntil, r.KeptCause = p.int(f[3]), Cause(f[4][0])
		if r.KeptUntil == 0 {
			return "", false
		}
	}
	if size := uint64(len(rest)); p.err != nil || user > size || extra > size-user {
		return "", false
	}
	r.User = rest[:user]
	return rest[user+extra:], true
}

// DecodeEvent decodes one message of a room's channel.
func DecodeEvent(payload string) (Event, error) {
	var f [eventFields]string
	rest, ok := fields(payload, f[:])
	if !ok || len(f[0]) != 1 {
		return Event{}, fmt.Errorf("event: %w", errFormat)
	}
	kind, replaces := EventType(f[0][0]), f[5][1:]
	if replaces != "" && (f[5][0] != '.' || kind != Joined && kind != Replaced) {
		return Event{}, fmt.Errorf("event: %w", errFormat)
	}
	switch kind {
	case Joined, Replaced, Left, State, Meta, Disconnected:
	default:
		return Event{}, fmt.Errorf("event type %.20q: %w", f[0], errFormat)
	}
	var p parser
	at := p.int(f[4])
	if p.err != nil {
		return Event{}, fmt.Errorf("event: %w", errFormat)
	}
	r, err := DecodeRecord(f[6], rest)
	if err != nil {
		return Event{}, err
	}
	return Event{
		Type: kind, Epoch: f[1], Tag: f[2], Prev: f[3], At: at, Cause: Cause(f[5][0]), Replaces: replaces, Record: r,
	}, nil
}

// decodePosition decodes "epoch seq tag". The empty string is the zero Position. A
// position may go on with the counts of the incarnations, see decodeOwners.
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

// decodeOwners returns the incarnations that follow a position. Each is followed by its
// number of entries.
func decodeOwners(s string) ([]string, error) {
	var owners []string
	f := strings.Split(s, " ")
	if len(f) < 3 {
		return nil, nil
	}
	f = f[3:]
	for ; len(f) >= 2; f = f[2:] {
		owners = append(owners, f[0])
	}
	if len(f) > 0 {
		return nil, fmt.Errorf("position %.40q: %w", s, errFormat)
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
