package occupancy

import (
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var mutate = flag.String("occupancy.mutate", "", `comma-separated names of mutations for TestMutations, or "all"`)

// mutation takes one mechanism out.
type mutation struct {
	name, file, old, new string
	by                   string // tests that must notice it; empty: TestModel
}

var mutations = []mutation{
	{
		name: "no interval", file: "push.go",
		old: "		at = r.pushedAt + interval\n", new: "",
	},
	{
		name: "an empty room does not wait", file: "push.go",
		old: "		at = max(at, r.emptyAt+interval)\n", new: "",
	},
	{
		name: "an empty room waits from its first reading", file: "reading.go",
		old: "case changed && known:", new: "case changed && known && r.emptyAt == 0:",
	},
	{
		name: "one last update for all watchers", file: "push.go",
		old: "		r.watchers[w], r.mixed = u, true\n", new: "		r.watchers[w] = nil\n",
	},
	{
		name: "every push to every watcher", file: "push.go",
		old: "if !last.same(u) {", new: "if last != nil {",
	},
	{
		name: "pushes are put off by new watchers", file: "reading.go",
		old: "if r.mayPush() && r.pushTime() <= now {", new: "if r.closed {",
		by: "TestNewWatchersDoNotDelayPushes",
	},
	{
		name: "an event during a reading is forgotten", file: "reading.go",
		old: "	r.apply(n, now)\n", new: "	r.apply(n, now)\n	r.dirty.Store(false)\n",
		by: "TestAnEventDuringAReading",
	},
	{
		name: "events cause no reading", file: "room.go",
		old: "if r.dirty.Load() {", new: "if r.closed {",
		by: "TestTheFirstPushComesAtOnce|TestAStormOfEvents",
	},
	{
		name: "each event causes a reading", file: "room.go",
		old: "	return last + r.rooms.interval(r.name)\n", new: "	return 1\n",
		by: "TestAStormOfEvents|TestAClientThatFlapsInAnEmptyRoom",
	},
	{
		name: "watchers cause readings without a pause", file: "room.go",
		old: "at = first(at, r.readAt+readGap)", new: "at = 1",
		by: "TestReadingsForWatchersAreSpacedOut",
	},
	{
		name: "numbers from memory despite events", file: "room.go",
		old: "r.stage == stageIdle && !r.dirty.Load() && !r.urgent", new: "r.stage == stageIdle",
		by: "TestManyRoomsAreReadWithOneCall|TestAnIntervalOfARuleThatChanges",
	},
	{
		name: "numbers of a reading that had begun", file: "watch.go",
		old: "number: r.begun + 1}", new: "number: r.begun}",
		by: "TestAWatcherDuringAStorm",
	},
	{
		name: "no reading after a confirmation", file: "listen.go",
		old: "	r.serial++\n	r.urgent = true\n	if again {\n		r.missed(rs.now())\n	}\n", new: "",
		by: "TestAConfirmationWithoutADisconnect",
	},
	{
		name: "a disconnect is not noticed", file: "listen.go",
		old: "		r.confirmed = false\n		r.missed(now)\n", new: "		_ = now\n",
		by: "TestALongDisconnect",
	},
	{
		name: "a disconnect during a reading is not noticed", file: "reading.go",
		old: "if r.serial == r.readFrom {", new: "{",
		by: "TestADisconnectDuringAReading",
	},
	{
		name: "no comparison", file: "reading.go",
		old: "	r.checkAt = now + wait.Jitter(r.rooms.cfg.CompareEvery, 0.2)\n", new: "",
	},
	{
		name: "numbers are never stale", file: "room.go",
		old: "r.troubleAt != 0 && now >= r.troubleAt+r.rooms.cfg.StaleAfter", new: "r.closed",
		by: "TestALongDisconnect|TestRedisAway|TestResync",
	},
	{
		name: "a call that hangs is no trouble", file: "room.go",
		old: "		r.troubleAt = r.readAt\n", new: "",
		by: "TestASlowAnswerIsNoTrouble",
	},
	{
		name: "trouble does not end", file: "reading.go",
		old: "r.troubleAt, r.complete = 0, r.begun", new: "r.complete = r.begun",
	},
	{
		name: "a failed reading is not repeated", file: "reading.go",
		old: "r.stage, r.urgent = stageIdle, true", new: "r.stage = stageIdle",
		by: "TestRedisAway",
	},
	{
		name: "no pause between failures", file: "reading.go",
		old: "		r.retryAt = now + wait.Jitter(retryBackoff.After(int(r.failures)), 0.5)\n", new: "		_ = now\n",
		by: "TestRedisAway",
	},
	{
		name: "one line for all buckets", file: "queue.go",
		old: "	l := q.alone[bucket]\n", new: "	l := q.alone[-1-bucket]\n",
		by: "TestOneNodeAway",
	},
	{
		name: "buckets stay apart", file: "queue.go",
		old: "			delete(q.alone, l.bucket)\n", new: "",
		by: "TestOneNodeAway",
	},
	{
		name: "a room that is rebuilding counts", file: "reading.go",
		old: "n.Rebuilding || lost", new: "lost",
		by: "TestRebuilding",
	},
	{
		name: "a lost room counts at once", file: "reading.go",
		old: "lost && now < r.lostUntil", new: "false",
		by: "TestRebuilding|TestALostRoomThatStaysEmpty|TestARoomThatWentBack",
	},
	{
		name: "a lost room never counts", file: "reading.go",
		old: "lost && now < r.lostUntil", new: "lost",
	},
	{
		name: "the seq falls", file: "reading.go",
		old: "v.shownSeq = max(v.shownSeq, p.Seq)", new: "v.shownSeq = p.Seq",
	},
	{
		name: "the seq of an earlier epoch is forgotten", file: "reading.go",
		old: "			next.seq = max(next.seq, f.seq)\n", new: "",
		by: "TestPositionsThatAreShown",
	},
	{
		name: "rooms stay for ever", file: "watch.go",
		old: "		r.lingerAt = r.rooms.now() + max(rs.cfg.Linger, 0)\n", new: "",
	},
	{
		name: "a stale answer counts as the later one", file: "push.go",
		old: "		r.current = nil // a later update has a higher number\n", new: "",
	},
}

// TestMutations takes the mechanisms out one at a time, and has the other tests find out
// that each is missing. By default it checks only that there is something to take out.
func TestMutations(t *testing.T) {
	t.Parallel()
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			text, err := os.ReadFile(m.file)
			require.NoError(t, err)
			require.Equal(t, 1, strings.Count(string(text), m.old), "once in %s: %s", m.file, m.old)
			if *mutate != "all" && !slices.Contains(strings.Split(*mutate, ","), m.name) {
				return
			}
			m.mustBeNoticed(t, strings.Replace(string(text), m.old, m.new, 1))
		})
	}
}

// mustBeNoticed runs tests with another text of the mutation's file.
func (m mutation) mustBeNoticed(t *testing.T, text string) {
	t.Helper()
	dir := t.TempDir()
	file, err := filepath.Abs(m.file)
	require.NoError(t, err)
	changed, overlay := filepath.Join(dir, m.file), filepath.Join(dir, "overlay.json")
	list, err := json.Marshal(map[string]any{"Replace": map[string]string{file: changed}})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(changed, []byte(text), 0o600))
	require.NoError(t, os.WriteFile(overlay, list, 0o600))
	by := m.by
	if by == "" {
		by = "TestModel"
	}
	cmd := exec.CommandContext(t.Context(), "go", "test", "-overlay", overlay, "-vet", "off", "-run", "^("+by+")$", "-timeout", "10m", ".")
	out, err := cmd.CombinedOutput()
	require.Error(t, err, "no test has noticed it")
	require.Contains(t, string(out), "--- FAIL: ", "it failed otherwise: %.3000s", out)
	t.Logf("%s", firstFailures(string(out)))
}

// firstFailures returns the names of the first tests that failed.
func firstFailures(out string) string {
	var names []string
	for line := range strings.Lines(out) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "--- FAIL: "); ok && len(names) < 3 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}
