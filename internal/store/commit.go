package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Size estimates the number of bytes that the op adds to a call.
func (o *Op) Size() int {
	return 200 + 5*len(o.Room) + 5*len(o.Conn) + 2*len(o.Entry) + len(o.Meta) + len(o.State) + len(o.User) + 3*len(o.Replaces)
}

// Commit executes a batch of changes of one owner in one script call. All ops belong to
// the given bucket. number must rise from batch to batch of one incarnation and bucket.
// If the outcome of a batch is unknown, the caller sends its changes again under a
// higher number; the earlier batch then changes nothing if it arrives later.
//
// known is the number of the newest batch of the incarnation that is known to have run
// in this bucket; 0 means none. If Redis has not seen that batch, although it
// acknowledged it, the new one is refused.
//
// If the whole batch was refused, the error is ErrFenced, ErrLate or ErrForgotten. Any
// other error means that the outcome is unknown. The refusal of a single op is in its
// result.
func (s *Store) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []Op) ([]OpResult, error) {
	results := make([]OpResult, len(ops))
	r := s.request(bucket, inc, number, known, len(ops))
	again, err := s.commit(ctx, r, ops, orderOf(ops), results)
	if err != nil {
		return nil, err
	}
	if len(again) == 0 {
		return results, nil
	}
	r = s.request(bucket, inc, number, known, len(again)) // the same number, because it is the same batch
	r.own = true
	if again, err = s.commit(ctx, r, ops, again, results); err == nil && len(again) > 0 {
		err = fmt.Errorf("asked for keys that it had: %w", errFormat)
	}
	if err != nil {
		return nil, err
	}
	return results, nil
}

// commit makes one call for the ops in the given order. It returns the ops to send
// again with the keys of their entries.
func (s *Store) commit(ctx context.Context, r *request, ops []Op, order []int, results []OpResult) (again []int, err error) {
	r.look(ops)
	for _, i := range order {
		r.add(&ops[i])
	}
	keys, args := r.call()
	began := time.Now()
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
		return nil, ErrForgotten
	}
	answers, _ := reply.([]any)
	health := &s.at(keys[0]).health
	health.noteSuccess(began) // the script has at least written the batch's number
	for _, i := range order {
		if len(answers) == 0 {
			return nil, fmt.Errorf("%d ops not all answered: %w", len(order), errFormat)
		}
		if answers[0] == "k" {
			again = append(again, i)
			answers = answers[1:]
			continue
		}
		results[i], answers = decodeAnswer(&ops[i], answers)
		if err := results[i].Err; errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrData) && !errors.Is(err, ErrFull) {
			health.noteFailure(false)
		}
	}
	if len(answers) > 0 {
		return nil, fmt.Errorf("%d ops and more answers: %w", len(order), errFormat)
	}
	return again, nil
}

// byRoom returns an order in which the items of one room follow each other. Within a
// room the items keep their order.
func byRoom(n int, room func(int) string) []int {
	order := make([]int, 0, n)
	last := make(map[string]int, n) // index of the room's last item so far
	next := make([]int, n)          // index of the next item of the same room; 0: none
	first := make([]int, 0, n)
	for i := range n {
		name := room(i)
		if before, ok := last[name]; ok {
			next[before] = i
		} else {
			first = append(first, i)
		}
		last[name] = i
	}
	for _, i := range first {
		order = append(order, i)
		for i = next[i]; i != 0; i = next[i] {
			order = append(order, i)
		}
	}
	return order
}

// orderOf returns the order in which ops are sent, see byRoom.
func orderOf(ops []Op) []int { return byRoom(len(ops), func(i int) string { return ops[i].Room }) }

// decodeAnswer decodes the answer to an op from the front of a reply, and returns the
// rest.
func decodeAnswer(o *Op, answers []any) (OpResult, []any) {
	switch first := answers[0].(type) {
	case int64:
		if len(answers) < 2 {
			break
		}
		if at, ok := answers[1].(string); ok {
			return decodeDone(o, int(first), at), answers[2:]
		}
	case string:
		return decodeStatus(first), answers[1:]
	}
	return OpResult{Err: errFormat}, answers[1:]
}

// decodeDone decodes the answer to an op that has written: a number and the position of
// the room. More may follow the position.
func decodeDone(o *Op, n int, at string) OpResult {
	r := OpResult{Status: Done}
	var more []string
	if rest, lost := strings.CutPrefix(at, " "); lost { // no position
		at, more = "", strings.Split(rest, " ")
	} else if f := strings.SplitN(at, " ", 4); len(f) == 4 {
		more = strings.Split(f[3], " ")
	}
	if r.Position, r.Err = decodePosition(at); r.Err != nil {
		return r
	}
	var p parser
	switch {
	case o.Kind == OpJoin:
		r.Total, r.Users = n, n
		if len(more) == 2 {
			r.Users = -1
			if more[0] != "?" {
				r.Users = int(p.int(more[0]))
			}
			r.Replaced, r.ReplacedOwner, _ = strings.Cut(more[1], ":")
		}
	case o.Kind == OpLeave && len(more) == 1:
		r.KeptUntil = p.int(more[0])
	}
	r.Err = p.err
	return r
}

func decodeStatus(line string) OpResult {
	if line == "" {
		return OpResult{Err: errFormat}
	}
	rest := strings.TrimPrefix(line[1:], " ")
	switch OpStatus(line[0]) {
	case Gone, Other:
		return OpResult{Status: OpStatus(line[0]), Owner: rest}
	case Full:
		return OpResult{Status: Full, FullOf: Bound(rest)}
	case Done:
		r := OpResult{Status: Done}
		if rest != "" { // Redis holds newer metadata
			version, data, _ := strings.Cut(rest, " ")
			r.MetaVersion, r.Err = strconv.ParseUint(version, 10, 64)
			if data != "" {
				r.Meta = []byte(data)
			}
		}
		return r
	}
	return OpResult{Err: refusal(rest)}
}
