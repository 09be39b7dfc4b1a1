package store

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

const goodRecord = "e1 I 60000 7 2 s 3 7 1700000009000 1700000000000 7\n{\"a\":1}{\"s\":2}"

func TestDecodeRecord(t *testing.T) {
	t.Parallel()
	r, err := DecodeRecord("c", goodRecord)
	require.NoError(t, err)
	assert.Equal(t, Record{
		Conn: "c", Entry: "e1", Incarnation: "I", Seq: 7, JoinedAt: 1_700_000_000_000, TTL: time.Minute, MetaVersion: 3,
		Meta: []byte(`{"a":1}`), StateVersion: 2, State: []byte(`{"s":2}`), StateSilent: true, StateUntil: 1_700_000_009_000,
	}, r)
	for _, bad := range []string{
		"", "\n", "e1", strings.Replace(goodRecord, " 7 ", " 70 ", 1), strings.ReplaceAll(goodRecord, " 3 7 ", " 3 70 "),
		strings.ReplaceAll(goodRecord, " 3 7 ", " 3 6 "), goodRecord + "x", goodRecord[:len(goodRecord)-1],
		strings.ReplaceAll(goodRecord, " 3 7 ", " 3 18446744073709551615 "), strings.ReplaceAll(goodRecord, " 7\n", " -7\n"),
		strings.ReplaceAll(goodRecord, "\n", " "), strings.ReplaceAll(goodRecord, "60000", "1e3"),
		strings.ReplaceAll(goodRecord, "e1 ", " "), goodRecord[:20],
	} {
		_, err := DecodeRecord("c", bad)
		require.ErrorIs(t, err, errFormat, "%q", bad)
	}
}

// The personal part of a record stands between the fields and the metadata. Its extra
// bytes are skipped.
func TestDecodePersonalRecord(t *testing.T) {
	t.Parallel()
	const plain, live = "e1 ~ 0 7 2 s 3 7 0 1700000000000 7", " 3 60000 5"
	const data = "\na\nbextra{\"a\":1}{\"s\":2}"
	want := Record{
		Conn: "c", Entry: "e1", Incarnation: NoOwner, Seq: 7, JoinedAt: 1_700_000_000_000, MetaVersion: 3,
		Meta: []byte(`{"a":1}`), StateVersion: 2, State: []byte(`{"s":2}`), StateSilent: true, User: "a\nb", Grace: time.Minute,
	}
	r, err := DecodeRecord("c", plain+live+data)
	require.NoError(t, err)
	assert.Equal(t, want, r)
	r, err = DecodeRecord("c", plain+live+" 1700000060000 b"+data)
	require.NoError(t, err)
	want.KeptUntil, want.KeptCause = 1_700_000_060_000, CauseLost
	assert.Equal(t, want, r)
	assert.True(t, r.Kept())
	for _, bad := range []string{
		" 3", " 3 60000", " 3 60000 50", " 30 60000 5", " 3 60000 4", " 2 60000 5", " 3 6x 5", " 3  5", " 3 60000 5 ", " 3 60000 5 17",
		" 3 60000 5 17 bb", " 3 60000 5 x b", " 3 60000 5 17 b 1", " 18446744073709551615 0 5", " 3 0 18446744073709551615",
	} {
		_, err := DecodeRecord("c", plain+bad+data)
		require.ErrorIs(t, err, errFormat, "%q", bad)
	}
	_, err = DecodeRecord("c", strings.Replace(plain, "~", "I", 1)+live+" 17 b"+data)
	require.ErrorIs(t, err, errFormat, "only kept places have a deadline")
}

func TestDecodeEvent(t *testing.T) {
	t.Parallel()
	e, err := DecodeEvent("S epoch tag prev 1700000000001 . c " + goodRecord)
	require.NoError(t, err)
	r, err := DecodeRecord("c", goodRecord)
	require.NoError(t, err)
	assert.Equal(t, Event{Type: State, Epoch: "epoch", Tag: "tag", Prev: "prev", At: 1_700_000_000_001, Cause: '.', Record: r}, e)
	assert.Equal(t, Position{Epoch: "epoch", Seq: 7, Tag: "tag"}, e.Position())
	for _, bad := range []string{
		"", goodRecord, "X e t p 1 . c " + goodRecord, "JJ e t p 1 . c " + goodRecord, "J e t p x . c " + goodRecord,
		"J e t p 1  c " + goodRecord, "J e t p 1 .:1:2 c " + goodRecord, "J e t p 1 .:1:2:3:4 c " + goodRecord,
		"J e t p 1 .:x:2:3 c " + goodRecord, "J e t p 1 .old:1::3 c " + goodRecord, "J e  p 1 . c " + goodRecord, "J e t p 1 . " + goodRecord, "J e t p 1 . c ",
	} {
		_, err := DecodeEvent(bad)
		require.ErrorIs(t, err, errFormat, "%q", bad)
	}
}

// After its cause an event may name the connection whose place was taken, and the
// numbers of the user and of the room.
func TestDecodeCause(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Event{
		".":              {Cause: '.'},
		"=":              {Cause: '.', Rebuild: true},
		"b":              {Cause: CauseLost},
		".old":           {Cause: '.', Replaces: "old"},
		"..=b":           {Cause: '.', Replaces: ".=b"},
		"l:0:12:7":       {Cause: CauseLeft, Counted: true, Connections: 12, Users: 7},
		"l::12:7":        {Cause: CauseLeft, Counted: true, Connections: 12, Users: 7},
		"=:1:2:2":        {Cause: '.', Rebuild: true, Counted: true, UserConnections: 1, Connections: 2, Users: 2},
		".old:2:1000:30": {Cause: '.', Replaces: "old", Counted: true, UserConnections: 2, Connections: 1000, Users: 30},
	} {
		e, err := DecodeEvent("D epoch tag prev 5 " + text + " c " + goodRecord)
		require.NoError(t, err, text)
		want.Type, want.Epoch, want.Tag, want.Prev, want.At, want.Record = Disconnected, "epoch", "tag", "prev", 5, e.Record
		assert.Equal(t, want, e, text)
	}
}

func TestDecodePositionAndOwned(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{" ", "e", "e 1", "e x t", "e -1 t", "mine"} {
		_, err := decodePosition(bad)
		require.ErrorIs(t, err, errFormat, "%q", bad)
	}
	for _, bad := range []string{"", "e", "e a", "e a b", "x a b c"} {
		_, err := decodeOwned(bad)
		require.ErrorIs(t, err, errFormat, "%q", bad)
	}
	// Kept places are counted, and have no owner. The numbers of the room are no count.
	for position, want := range map[string]int{
		"": 0, "e 1 t": 0, "e 1 t I 2": 2, "e 1 t * 5 I 2 ~ 1 J 4": 7, "e 1 t * ?7/1700000000000 ~ 3": 3, "e 1 t * 5": 0,
	} {
		assert.Equal(t, want, countedIn(position), position)
	}
	owners, err := decodeOwners("e 1 t * 5 I 2 ~ 1 J 4")
	require.NoError(t, err)
	assert.Equal(t, []string{"I", "J"}, owners)
	assert.Equal(t, 2, entriesOf("e 1 t * 5 I 2 ~ 1 J 4", "I"))
	_, err = decodeOwners("e 1 t * 5 I")
	require.ErrorIs(t, err, errFormat)
	ref, err := decodeOwned("e c e1  two  spaces ")
	require.NoError(t, err)
	assert.Equal(t, EntryRef{Conn: "c", Entry: "e1", Room: " two  spaces "}, ref)
}

// encodeRecord encodes a record as lua/lib.lua does.
func encodeRecord(r Record) string {
	flag, tail := ".", ""
	if r.StateSilent {
		flag = "s"
	}
	if r.User != "" || r.Grace != 0 || r.KeptUntil != 0 {
		tail = fmt.Sprintf(" %d %d 0", len(r.User), r.Grace.Milliseconds())
	}
	if r.KeptUntil != 0 {
		tail += fmt.Sprintf(" %d %s", r.KeptUntil, []byte{byte(r.KeptCause)})
	}
	return fmt.Sprintf("%s %s %d %d %d %s %d %d %d %d %d%s\n%s%s%s", r.Entry, r.Incarnation, r.TTL.Milliseconds(), len(r.State),
		r.StateVersion, flag, r.MetaVersion, len(r.Meta), r.StateUntil, r.JoinedAt, r.Seq, tail, r.User, r.Meta, r.State)
}

// encodeCause encodes the cause of an event.
func encodeCause(e Event) string {
	text := []byte{byte(e.Cause)}
	if e.Rebuild {
		text[0] = byte(rebuild)
	}
	text = append(text, e.Replaces...)
	if e.Counted {
		text = fmt.Appendf(text, ":%d:%d:%d", e.UserConnections, e.Connections, e.Users)
	}
	return string(text)
}

// fitsDuration reports whether the record's durations were read without overflow.
func fitsDuration(r Record) bool {
	return r.TTL >= 0 && r.TTL <= 1000*time.Hour && r.Grace >= 0 && r.Grace <= 1000*time.Hour
}

func FuzzRecord(f *testing.F) {
	f.Add("c", goodRecord)
	f.Add("", "\n")
	f.Add("c", "a b 1 2 3 . 4 18446744073709551615 5 6 7\nx")
	f.Add("c", "a b 1 0 3 . 4 0 5 6 7\n")
	f.Add("c", "a b 1 0 3 . 4 0 5 6 7 2 1000 1\nu\nx")
	f.Add("c", "a ~ 0 0 3 . 4 1 5 6 7 0 1000 0 99 c\n1")
	f.Fuzz(func(t *testing.T, conn, s string) {
		r, err := DecodeRecord(conn, s)
		if err != nil {
			require.ErrorIs(t, err, errFormat)
			return
		}
		if !fitsDuration(r) {
			return
		}
		again, err := DecodeRecord(conn, encodeRecord(r))
		require.NoError(t, err)
		require.Equal(t, r, again)
	})
}

func FuzzEvent(f *testing.F) {
	f.Add("J e t - 5 . c " + goodRecord)
	f.Add("L e t p 5 d c a b 0 0 0 . 0 0 0 0 7\n")
	f.Add("M       ")
	f.Add("D e t p 5 b:1:2:3 c a ~ 0 0 3 . 4 0 5 6 7 1 1000 0 99 c\nu")
	f.Add("J e t p 5 =old:1:2:3 c " + goodRecord)
	f.Add("L 0 0 0 0 \xe4 0 0 0 0 0 0 0 0 0 0 0 0\n")
	f.Fuzz(func(t *testing.T, s string) {
		e, err := DecodeEvent(s)
		if err != nil {
			require.ErrorIs(t, err, errFormat)
			require.Equal(t, Event{}, e)
			return
		}
		if !fitsDuration(e.Record) || e.UserConnections < 0 || e.Connections < 0 || e.Users < 0 {
			return
		}
		// Written as bytes: %c would encode a byte above ASCII as two.
		again, err := DecodeEvent(fmt.Sprintf("%s %s %s %s %d %s %s %s", []byte{byte(e.Type)}, e.Epoch, e.Tag, e.Prev, e.At,
			encodeCause(e), e.Conn, encodeRecord(e.Record)))
		require.NoError(t, err)
		require.Equal(t, e, again)
	})
}

// FuzzRefs covers the formats other than records and events.
func FuzzRefs(f *testing.F) {
	for _, s := range []string{"", "e 1 t", "e 18446744073709551616 t", "e c e1 room", "e c e1  two  spaces ", "c c", "c ", "e   ", "e c e1 \n\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if p, err := decodePosition(s); err != nil {
			require.ErrorIs(t, err, errFormat)
			require.Equal(t, Position{}, p)
		} else if s != "" {
			again, err := decodePosition(fmt.Sprintf("%s %d %s", p.Epoch, p.Seq, p.Tag))
			require.NoError(t, err)
			require.Equal(t, p, again)
		}
		switch ref, err := decodeOwned(s); {
		case err != nil:
			require.ErrorIs(t, err, errFormat)
			require.Equal(t, EntryRef{}, ref)
		case strings.HasPrefix(s, "c "):
			require.Equal(t, s, "c "+ref.Conn)
		default:
			require.Equal(t, s, "e "+ref.Conn+" "+ref.Entry+" "+ref.Room)
		}
	})
}

// roundTrip sends users' bytes through every script that carries them, and compares
// every byte of the result.
func roundTrip(w *world, room string, meta, state []byte) {
	w.Helper()
	op := joinTTL(room, "c", "e1", time.Minute)
	op.MetaVersion, op.Meta, op.StateVersion, op.State = 1, meta, 1, state
	inc := "I" + newTag()
	w.ok(inc, Op{Kind: OpConnect, Conn: "c", MetaVersion: 1, Meta: meta}, op)
	same := func(r Record, version uint64) {
		w.Helper()
		require.Equal(w, string(meta), string(r.Meta))
		require.Equal(w, string(state), string(r.State))
		require.Equal(w, version, r.StateVersion)
		require.Equal(w, "e1", r.Entry)
	}
	same(w.record(room, "c"), 1)
	// Lua has decoded the record and written it again.
	w.ok(inc, Op{Kind: OpUpdate, Room: room, Conn: "c", Entry: "e1", TTL: time.Minute, MetaVersion: 2, Meta: meta})
	w.ok(inc, Op{Kind: OpUpdate, Room: room, Conn: "c", Entry: "e1", TTL: time.Minute, StateVersion: 2, State: state})
	same(w.record(room, "c"), 2)
	snap, err := w.Snapshot(w.Context(), room)
	require.NoError(w, err)
	same(snap.Records[0], 2)
	require.Equal(w, string(state), w.rdb.Get(w.Context(), w.keys.State(room, "c")).Val())
	m, err := w.ConnMeta(w.Context(), "c")
	require.NoError(w, err)
	require.Equal(w, string(meta), string(m.Data))
	require.ElementsMatch(w, []EntryRef{{Conn: "c"}, {Conn: "c", Entry: "e1", Room: room}}, w.owned(inc))
	require.Equal(w, []string{room}, w.rooms())
	w.whileDead(inc, func() { require.Equal(w, "+", w.cleanUp(item(GroundDead, room, "c", "e1", inc))) })
	w.ok(inc, Op{Kind: OpDisconnect, Conn: "c"})
	require.Empty(w, w.owned(inc))

	events := w.events()
	types := "JMSL"
	if len(state) == 0 {
		types = "JML"
	}
	require.Equal(w, types, kinds(events))
	for _, e := range events {
		require.Equal(w, room, e.Room)
		switch e.Type {
		case Joined, Meta:
			same(e.Record, 1)
		case State:
			require.Equal(w, string(state), string(e.Record.State))
		}
	}
}

var nasty = []string{
	"lobby", "two words", " ", "new\nline", "\n", "a:b:conn:c", "{tag}", "}{", "*?[a]", "nul\x00nul", "\xff\xfe\x80", "ünïcödé 🎉",
	"'quoted\" \\", "%s%d %(%w)", "-", "0", "e c e1 other", "c c", "\r\n", strings.Repeat("long ", 200),
}

func TestAnyBytesSurvive(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.listen()
		large := `{"big":"` + strings.Repeat("0123456789", 10_000) + `"}`
		for i, s := range nasty {
			meta, state := []byte(s), []byte(nasty[(i+3)%len(nasty)])
			roundTrip(w, s, meta, state)
		}
		roundTrip(w, "large", []byte(large), []byte(large))
		roundTrip(w, "deep\x00", []byte(`{"n": 12345678901234567890.000100, "u": "\u0000\n"}`), []byte("{\n\t\"x\": [ ]\n}"))
		roundTrip(w, "none", nil, nil)
		assert.Empty(w, w.permanent())
	})
}

func FuzzThroughLua(f *testing.F) {
	f.Add("r", []byte("{}"), []byte("[]"))
	f.Add("\n", []byte("\n"), []byte("\x00"))
	f.Add("a b", []byte(nil), []byte("1 2"))
	rng := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		f.Add(randomText(rng, 12), []byte(randomText(rng, 40)), []byte(randomText(rng, 40)))
	}
	f.Fuzz(func(t *testing.T, room string, meta, state []byte) {
		if room == "" {
			t.Skip("a room has a name")
		}
		w := newWorld(t, nil)
		w.listen()
		roundTrip(w, room, meta, state)
	})
}

// randomText consists of characters that have a meaning in the formats.
func randomText(rng *rand.Rand, n int) string {
	const letters = "ab01 \n:{}\x00\xff-+.!\"\\%"
	b := make([]byte, 1+rng.IntN(n))
	for i := range b {
		b[i] = letters[rng.IntN(len(letters))]
	}
	return string(b)
}

// Random bytes go through a real Redis, whose Lua differs from the embedded one.
func TestRandomBytesSurvive(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	w.listen()
	rng := rand.New(rand.NewPCG(3, 4))
	for range 150 {
		roundTrip(w, randomText(rng, 12), []byte(randomText(rng, 60)), []byte(randomText(rng, 60)))
	}
}
