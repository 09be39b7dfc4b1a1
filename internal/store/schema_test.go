package store

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// opSchema is one line of the list of ops in the header of commit.lua.
type opSchema struct{ args, keys []string }

// commitSchema reads the list of ops, by kind.
func commitSchema(t *testing.T) map[string]opSchema {
	t.Helper()
	schema := make(map[string]opSchema)
	for _, m := range regexp.MustCompile(`(?m)^--   (\w) \|([^|\n]*)\|([^|\n]*)\|`).FindAllStringSubmatch(commitLua, -1) {
		require.NotContains(t, schema, m[1])
		schema[m[1]] = opSchema{strings.Fields(m[2]), strings.Fields(m[3])}
	}
	return schema
}

// The function perform returns for each kind how many arguments and keys it used.
func TestCommitScriptFollowsItsSchema(t *testing.T) {
	t.Parallel()
	_, body, ok := strings.Cut(commitLua, "\nlocal function perform(")
	require.True(t, ok)
	body, _, ok = strings.Cut(body, "\nend\n")
	require.True(t, ok)
	branches := regexp.MustCompile(`kind == '(\w)' then`).FindAllStringSubmatchIndex(body, -1)
	used := make(map[string][2]int)
	counts := regexp.MustCompile(`, (\d+), (\d+)\n`)
	for i, b := range branches {
		end := len(body)
		if i+1 < len(branches) {
			end = branches[i+1][0]
		}
		found := counts.FindAllStringSubmatch(body[b[1]:end]+"\n", -1)
		require.NotEmpty(t, found, body[b[0]:end])
		kind := body[b[2]:b[3]]
		used[kind] = [2]int{atoi(t, found[0][1]), atoi(t, found[0][2])}
		if i == len(branches)-1 { // what follows the last branch is for D
			require.Len(t, found, 2)
			used["D"] = [2]int{atoi(t, found[1][1]), atoi(t, found[1][2])}
		}
		for _, ref := range regexp.MustCompile(`args\[ai \+ (\d+)\]`).FindAllStringSubmatch(body[b[1]:end], -1) {
			require.LessOrEqual(t, atoi(t, ref[1]), used[kind][0], "op %s", kind)
		}
	}
	want := make(map[string][2]int)
	for kind, s := range commitSchema(t) {
		want[kind] = [2]int{len(s.args), len(s.keys)}
	}
	require.Len(t, want, 18)
	require.Equal(t, want, used)
}

func atoi(t *testing.T, text string) int {
	t.Helper()
	n, err := strconv.Atoi(text)
	require.NoError(t, err)
	return n
}

// Each argument and each key of a request is what the schema says, for ops of all kinds.
func TestRequestFollowsTheSchema(t *testing.T) {
	t.Parallel()
	schema, keys := commitSchema(t), testKeys{buckets: 1}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	d := &dice{Rand: rand.New(rand.NewPCG(seed, 0)), entries: make(map[string]int)}
	seen := make(map[string]bool)
	for round := 0; round < 200 || len(seen) < len(schema); round++ {
		require.Less(t, round, 10_000, "only %v", slices.Sorted(maps.Keys(seen)))
		r := newRequest(keys, 0, "I", 7, 3, 10)
		r.own = d.IntN(3) == 0
		r.tracked = func(room string) bool { return room == "q" }
		ops := make([]Op, 1+d.IntN(10))
		for i := range ops {
			ops[i] = d.anyOp()
		}
		r.look(ops)
		for i := range ops {
			r.add(&ops[i])
		}
		names, args := r.call()
		require.Equal(t, []string{keys.Fence(0, "I"), keys.Owned(0, "I"), keys.Rooms(0)}, names[:3])
		rooms := atoi(t, args[roomsAt].(string))
		checkRequest(t, schema, ops, args[roomsAt+1:], names[3:3+rooms], names[3+rooms:], seen)
	}
}

// anyOp is a random op of any kind.
func (d *dice) anyOp() Op {
	o := d.op("I")
	if o.Kind == OpJoin && d.IntN(2) == 0 {
		o.Kind = []OpKind{OpConnect, OpDisconnect, OpRecount, OpTouch}[d.IntN(4)]
	}
	o.Known, o.Fresh, o.Entries = d.IntN(2) == 0, d.IntN(2) == 0, d.IntN(100)
	if len(o.State) > 0 && d.IntN(2) == 0 {
		o.StateLeft = time.Duration(1+d.IntN(1000)) * time.Millisecond
	}
	if d.IntN(4) == 0 {
		o.User, o.Grace, o.Rebuild = d.pick("", "ann", "bob"), time.Duration(d.IntN(3))*time.Second, time.Duration(d.IntN(2))*time.Second
		o.Person, o.Keep, o.Replaces = d.IntN(2) == 0, d.IntN(2) == 0, d.pick("", "a", "b")
		o.MaxConnections, o.MaxUsers = d.IntN(3), d.IntN(3)
	}
	return o
}

// checkRequest reads the arguments and keys as commit.lua does.
func checkRequest(t *testing.T, schema map[string]opSchema, ops []Op, args []any, seqs, names []string, seen map[string]bool) {
	t.Helper()
	keys := testKeys{buckets: 1}
	room, unique, before := "", make(map[string]bool), ""
	for len(args) > 0 {
		name := args[0].(string)
		kind := name[:1]
		s, ok := schema[kind]
		require.True(t, ok, name)
		require.Greater(t, len(args), len(s.args), name)
		require.GreaterOrEqual(t, len(names), len(s.keys), name)
		values := make(map[string]string)
		for i, arg := range s.args {
			values[arg] = text(args[i+1])
		}
		used := names[:len(s.keys)]
		args, names = args[1+len(s.args):], names[len(s.keys):]
		seen[kind] = true
		if kind == "R" || kind == "r" {
			room = values["room"]
			require.Equal(t, flag(room == "q"), values["tracked"])
			all := []string{keys.Members(room), keys.Users(room), keys.Kept(0), keys.Recount(room)}
			require.Equal(t, all[:len(s.keys)], used)
			require.NotEmpty(t, seqs)
			require.Equal(t, keys.Seq(room), seqs[0])
			seqs = seqs[1:]
			continue
		}
		require.NotEmpty(t, ops, name)
		o := &ops[0]
		if strings.Contains("WPQ", kind) { // of the op that follows
			require.NotContains(t, before, kind)
			before += kind
		} else {
			require.Equal(t, modifiers(o), before, "%+v", o)
			ops, before = ops[1:], ""
		}
		if strings.Contains("JjSMULlHC", kind) {
			require.Equal(t, o.Room, room, name)
		}
		if strings.Contains("JjSMULlH", kind) {
			require.False(t, unique[name], name)
			unique[name] = true
		}
		for arg, got := range values {
			require.Equal(t, wantArg(t, o, kind, arg), got, "%s of %s, %+v", arg, name, o)
		}
		for i, key := range s.keys {
			want := map[string]string{
				"members": keys.Members(o.Room), "conn": keys.Conn(o.Room, o.Conn), "state": keys.State(o.Room, o.Conn),
				"connection-meta": keys.ConnMeta(o.Conn),
			}[key]
			if kind == "Q" {
				want = map[string]string{"conn": keys.Conn(o.Room, o.Replaces), "state": keys.State(o.Room, o.Replaces)}[key]
			}
			require.NotEmpty(t, want, key)
			require.Equal(t, want, used[i], "%s of %s", key, name)
		}
		checkName(t, o, kind, name)
	}
	require.Empty(t, ops)
	require.Empty(t, names)
	require.Empty(t, seqs)
}

// modifiers returns the kinds of ops that precede an op.
func modifiers(o *Op) string {
	var list string
	join := o.Kind == OpJoin
	if join && (o.User != "" || o.Grace > 0) || o.Kind == OpUpdate && o.Person {
		list = "W"
	}
	if join && (o.MaxConnections > 0 || o.MaxUsers > 0) {
		list += "P"
	}
	if join && o.User != "" && o.Replaces != "" {
		list += "Q"
	}
	return list
}

func text(arg any) string {
	if b, ok := arg.([]byte); ok {
		return string(b)
	}
	return arg.(string)
}

// checkName checks the kind of an op, and the part of its name that has a meaning.
func checkName(t *testing.T, o *Op, kind, name string) {
	t.Helper()
	want := map[OpKind]string{
		OpJoin: "JjWPQ", OpLeave: "LlH", OpUpdate: "SMUTW", OpConnect: "K", OpDisconnect: "D", OpRecount: "C", OpTouch: "N",
	}[o.Kind]
	require.Contains(t, want, kind)
	switch kind {
	case "T":
		require.Equal(t, "T"+millis(o.TTL), name)
	case "L", "l", "H":
		require.Equal(t, o.Keep, kind == "H")
		require.Equal(t, string(o.Cause), name[len(name)-1:])
	}
}

// wantArg returns the value that an argument of the schema has to have.
func wantArg(t *testing.T, o *Op, kind, arg string) string {
	t.Helper()
	state := fmt.Sprintf("%d %d %s ", len(o.State), o.StateVersion, map[bool]string{true: "s", false: "."}[o.StateSilent])
	meta := fmt.Sprintf("%d %d ", o.MetaVersion, len(o.Meta))
	stateLeft := millis(o.StateLeft)
	if kind == "j" && o.Stated && len(o.State) == 0 {
		stateLeft = ""
	}
	rebuild := "0"
	if kind == "W" && o.Kind == OpJoin && o.User != "" {
		rebuild = millis(o.Rebuild)
	}
	left := millis(o.Left)
	if kind == "j" && o.TTL == 0 {
		left = "0"
	}
	want, ok := map[string]string{
		"conn": o.Conn, "entry": o.Entry, "ttl": millis(o.TTL), "left": left,
		"attributes": millis(o.TTL) + " " + state + meta,
		"meta":       string(o.Meta), "metaVersion": strconv.FormatUint(o.MetaVersion, 10), "metaAttributes": meta,
		"state": string(o.State), "stateVersion": strconv.FormatUint(o.StateVersion, 10), "stateAttributes": state,
		"user": o.User, "grace": millis(o.Grace), "rebuild": rebuild, "predecessor": o.Replaces,
		"mostConnections": strconv.Itoa(o.MaxConnections), "mostUsers": strconv.Itoa(o.MaxUsers),
		"stateLeft": stateLeft, "known": flag(o.Known), "fresh": flag(o.Fresh), "entries": strconv.Itoa(o.Entries),
	}[arg]
	require.True(t, ok, "argument %s of %s", arg, kind)
	return want
}
