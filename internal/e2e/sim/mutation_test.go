package sim

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

var simMutate = flag.String("sim.mutate", "", `comma-separated names of mutations for TestMutations, or "all"`)

// mutation removes a mechanism that a promise needs.
type mutation struct {
	name, file, old, new string
	more                 []mutation // further edits of the same mutation
}

var mutations = []mutation{
	{
		name: "clean up without the entry id", file: "internal/store/lua/cleanup.lua",
		old: "if id ~= entry then",
		new: "entry = id or entry\n  if not id then",
	},
	{
		name: "clean up although the key exists", file: "internal/store/lua/cleanup.lua",
		old: "if ttl == '0' or call('EXISTS', connKey) == 1 then",
		new: "if ttl == '0' then",
	},
	{
		name: "refresh of an absent entry", file: "internal/store/lua/update.lua",
		old: "  local v, out = read(key, conn)\n  if not v then\n    return out\n  end\n  local ttl = sub(name, 2)",
		new: "  local v, out = read(key, conn)\n  local ttl = sub(name, 2)\n  if out == '0' then\n" +
			"    v = entry .. mine .. ttl .. ' 0 0 . 0 0 0 ' .. nowText .. ' 1\\n'\n    call('HSET', key, conn, v)\n  end\n" +
			"  if not v then\n    return out\n  end",
	},
	{
		name: "no fence", file: "internal/store/lua/batch.lua",
		old: "if last == 'dead' or last == 'gone' then\n  return 'FENCED'\nend",
		new: "if last == 'dead' or last == 'gone' then\n  last = number\nend",
	},
	{
		name: "late batches", file: "internal/store/lua/batch.lua",
		old: "if last and tonumber(last) > tonumber(number) then",
		new: "if false then",
	},
	{
		name: "no tags", file: "internal/hub/history.go", old: "ev.Prev == pos.Tag", new: "true",
		more: []mutation{
			{file: "internal/hub/apply.go", old: "case known && tag == ev.Tag:", new: "case known && tag != \"\":"},
			{file: "internal/hub/compare.go", old: "known && tag != p.Tag", new: "false && known && tag != p.Tag"},
		},
	},
	{
		name: "no contact", file: "internal/lease/contact.go",
		old: "if c.blocked || at.Before(c.blockedUntil) || c.since.IsZero() || at.Sub(c.since) < c.ttl || at.Sub(c.streak[len(c.streak)-1].sent) > c.ttl/2 {",
		new: "if !c.known {",
	},
	{
		name: "no owner's turn after an outage", file: "internal/expired/turn.go",
		old: "if w.Last.Before(learned) || w.Since.IsZero() {\n\t\treturn time.Time{}, false\n\t}",
		new: "if !learned.IsZero() {\n\t\treturn learned.Add(turn), true\n\t}",
		more: []mutation{
			{file: "internal/expired/turn.go", old: "&& now.Sub(w.Back) < confirmed", new: ""},
		},
	},
	{
		name: "no trial write", file: "internal/expired/turn.go",
		old: "if w.Last.Before(learned) || w.Since.IsZero() {",
		new: "if !w.Failed.IsZero() && w.Since.IsZero() {",
		more: []mutation{
			{file: "internal/expired/turn.go", old: "&& now.Sub(w.Back) < confirmed", new: ""},
			{file: "internal/expired/queue.go", old: "q.trials.start(ctx, q.cfg.Store, bucket, fresh[bucket], q.wake.Set)", new: "_, _ = bucket, fresh"},
		},
	},
	{
		name: "the owner's turn counts from the event", file: "internal/expired/turn.go",
		old: "after := w.Since.Add(ownersTurn)", new: "after := w.Since",
	},
	{
		name: "owners back off for a second", file: "internal/local/inflight.go",
		old: "maxBackoff = 200 * time.Millisecond", new: "maxBackoff = time.Second",
	},
	{
		name: "no reconcile", file: "internal/local/reconcile.go",
		old: "if r.closed || !r.reconciling.CompareAndSwap(false, true) {",
		new: "if true {",
	},
	{
		name: "one queue", file: "internal/local/bucket_writer.go",
		old: "	s.queued, s.priority = true, p\n", new: "	p = background\n	s.queued, s.priority = true, p\n",
	},
	{
		name: "no check of keys", file: "internal/local/keycheck.go",
		old: "for first := true; len(list.rooms)+len(list.keys) > 0; first = false {",
		new: "for first := true; false; first = false {",
	},
	{
		name: "no unconfirmed members", file: "internal/hub/unconfirmed.go",
		old: "u.until[conn] = now.Add(d)", new: "u.until[conn] = now",
	},
	{
		name: "no updates for a room that was not read", file: "internal/hub/repair.go",
		old: "		m.deliverListed()\n", new: "",
	},
	{
		name: "a kept join is dropped", file: "redis.go",
		old: "	return joined, nil\n}", new: "	_, _ = c.Leave(ctx, room, store.CauseLeft)\n	return joined, nil\n}",
	},
	{
		name: "a kept place is not counted", file: "internal/store/lua/kept.lua",
		old: "  setUser(conn, user, false, user, true)\n", new: "",
	},
	{
		name: "places of users with other connections", file: "internal/store/lua/kept.lua",
		old: "if user ~= '' and not alone(conn, user) then", new: "if false then",
	},
	{
		name: "replacement without an end", file: "internal/store/lua/join.lua",
		old: "  local entry, by = vacate(place, mark .. '-', why, connKey, stateKey)\n", new: "  local entry, by = '', ''\n",
	},
	{
		name: "no caps", file: "internal/store/lua/join.lua",
		old: "if not mostConnections or rebuilds() or measure() then", new: "if true then",
	},
	{
		name: "events before the answer", file: "internal/hub/watch.go",
		old: "	defer m.mu.Unlock()\n	added = m.sinks.add(sink)\n	ready(m.view(!upToDate))\n",
		new: "	added = m.sinks.add(sink)\n	v := m.view(!upToDate)\n	m.mu.Unlock()\n	time.Sleep(time.Millisecond)\n	ready(v)\n",
	},
}

// edited returns the edited files.
func (m mutation) edited(t *testing.T) map[string]string {
	t.Helper()
	files := make(map[string]string)
	for _, edit := range append([]mutation{m}, m.more...) {
		text, ok := files[edit.file]
		if !ok {
			read, err := os.ReadFile(harness.InModule(edit.file))
			require.NoError(t, err)
			text = string(read)
		}
		require.Equal(t, 1, strings.Count(text, edit.old), "once in %s: %s", edit.file, edit.old)
		files[edit.file] = strings.Replace(text, edit.old, edit.new, 1)
	}
	return files
}

// TestMutations removes the mechanisms one at a time, and checks that the simulation
// notices each. That takes minutes. By default it only checks that the edits can be
// made.
func TestMutations(t *testing.T) {
	t.Parallel()
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			files := m.edited(t)
			if *simMutate != "all" && !slices.Contains(strings.Split(*simMutate, ","), m.name) {
				return
			}
			dir := copyModule(t)
			for file, text := range files {
				require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600))
			}
			cmd := exec.CommandContext(t.Context(), "go", "test", "./internal/e2e/sim", "-run", "TestSimulation$", "-timeout", "30m", "-sim.first", "-sim.seeds=200")
			cmd.Dir = dir
			out, err := cmd.CombinedOutput()
			require.Error(t, err, "200 seeds did not notice the mutation")
			found := regexp.MustCompile(`seed (\d+): (.*)`).FindStringSubmatch(string(out))
			require.NotNil(t, found, "the test failed for another reason: %s", out)
			t.Logf("%s: caught by seed %s: %s", m.name, found[1], found[2])
		})
	}
}

// copyModule copies the files that are needed to build and test the library.
func copyModule(t *testing.T) string {
	t.Helper()
	dir, root := t.TempDir(), harness.InModule()
	require.NoError(t, filepath.WalkDir(root, func(from string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path, err := filepath.Rel(root, from)
		switch {
		case err != nil:
			return err
		case d.IsDir() && (path == ".git" || path == "examples"):
			return filepath.SkipDir
		case d.IsDir():
			return os.MkdirAll(filepath.Join(dir, path), 0o700)
		}
		text, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, path), text, 0o600)
	}))
	return dir
}
