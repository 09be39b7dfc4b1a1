package store

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// Size is roughly how many bytes the op adds to a call.
func (o *Op) Size() int {
	return 200 + 5*len(o.Room) + 5*len(o.Conn) + 2*len(o.Entry) + len(o.Meta) + len(o.State)
}

// Commit executes a batch of one owner's changes, all in the given bucket, in
// one script call. number must rise from batch to batch of the same bucket and
// incarnation; a batch whose outcome is unknown is made anew under a higher
// number, and the earlier one changes nothing if it arrives after that.
//
// known is the number of the newest batch of the incarnation that is known to
// have run in this bucket, 0: none. Where Redis has not seen that one, which it
// had acknowledged, the batch is refused. The error is ErrFenced, ErrLate or ErrLost where the whole batch
// was refused, and otherwise means that the outcome is unknown. Refusals of single ops are in
// their results.
func (s *Store) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []Op) ([]OpResult, error) {
	keys := make([]string, 0, 3+4*len(ops))
	keys = append(keys, s.keys.Fence(bucket, inc), s.keys.Owned(bucket, inc), s.keys.Rooms(bucket))
	args := make([]any, 0, 5+13*len(ops))
	standing := strconv.FormatUint(known, 10)
	if known == 0 && s.listed && bucket == 0 {
		standing = "i"
		keys = append(keys, s.keys.Instances())
	}
	args = append(args, inc, strconv.FormatUint(number, 10), newTag(), s.keys.EventsPrefix(), standing)
	for i := range ops {
		keys, args = s.appendOp(keys, args, &ops[i])
	}
	reply, err := run(ctx, s, commitScript, keys, args...)
	if err != nil {
		return nil, err
	}
	switch reply {
	case "FENCED":
		return nil, ErrFenced
	case "LATE":
		return nil, ErrLate
	case "LOST":
		return nil, ErrLost
	}
	lines, err := texts(reply)
	if err != nil {
		return nil, err
	}
	if len(lines) != len(ops) {
		return nil, fmt.Errorf("%d answers to %d ops: %w", len(lines), len(ops), errFormat)
	}
	results := make([]OpResult, len(ops))
	for i, line := range lines {
		results[i] = decodeResult(ops[i].Kind, line)
	}
	return results, nil
}

func (s *Store) appendOp(keys []string, args []any, o *Op) ([]string, []any) {
	switch o.Kind {
	case OpConnect:
		return append(keys, s.keys.ConnMeta(o.Conn)),
			append(args, "K", o.Conn, strconv.FormatUint(o.MetaVersion, 10), o.Meta, flag(o.Fresh))
	case OpDisconnect:
		return append(keys, s.keys.ConnMeta(o.Conn)), append(args, "D", o.Conn)
	}
	keys = append(keys, s.keys.Members(o.Room), s.keys.Seq(o.Room), s.keys.Conn(o.Room, o.Conn), s.keys.State(o.Room, o.Conn))
	args = append(args, string(o.Kind), o.Room, o.Conn, o.Entry, newTag())
	if o.Kind == OpLeave {
		return keys, append(args, string(o.Cause))
	}
	silence := "."
	if o.StateSilent {
		silence = "s"
	}
	return keys, append(args, millis(o.TTL), millis(o.Left), strconv.FormatUint(o.MetaVersion, 10), o.Meta,
		strconv.FormatUint(o.StateVersion, 10), silence, millis(o.StateLeft), o.State)
}

func flag(v bool) string {
	if v {
		return "1"
	}
	return "0"
}

func decodeResult(kind OpKind, line string) OpResult {
	if line == "" {
		return OpResult{Err: errFormat}
	}
	rest := strings.TrimPrefix(line[1:], " ")
	switch OpStatus(line[0]) {
	case Done:
		return decodeDone(kind, rest)
	case Gone, Other:
		return OpResult{Status: OpStatus(line[0]), Holder: rest}
	}
	return OpResult{Err: refusal(rest)}
}

func decodeDone(kind OpKind, rest string) OpResult {
	r := OpResult{Status: Done}
	switch {
	case kind == OpJoin:
		i := strings.LastIndexByte(rest, ' ')
		if i < 0 {
			return OpResult{Err: errFormat}
		}
		r.Position, r.Err = decodePosition(rest[:i])
		if r.Err == nil {
			r.Total, r.Err = strconv.Atoi(rest[i+1:])
		}
	case kind == OpUpdate || kind == OpLeave:
		r.Position, r.Err = decodePosition(rest)
	case kind == OpConnect && rest != "":
		version, data, _ := strings.Cut(rest, " ")
		r.MetaVersion, r.Err = strconv.ParseUint(version, 10, 64)
		if data != "" {
			r.Meta = []byte(data)
		}
	}
	return r
}
