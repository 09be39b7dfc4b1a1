package api

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// scratch is a directory with a copy of a script of .ci.
type scratch struct {
	t   *testing.T
	dir string
}

func newScratch(t *testing.T, script string, tools ...string) *scratch {
	t.Helper()
	for _, tool := range append(tools, "bash", "awk") {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	source, err := os.ReadFile(filepath.Join(root, ".ci", script))
	require.NoError(t, err)
	s := &scratch{t: t, dir: t.TempDir()}
	s.write(".ci/"+script, string(source))
	return s
}

func (s *scratch) write(file, text string) {
	s.t.Helper()
	file = filepath.Join(s.dir, file)
	require.NoError(s.t, os.MkdirAll(filepath.Dir(file), 0o755))
	require.NoError(s.t, os.WriteFile(file, []byte(text), 0o755))
}

func (s *scratch) run(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = s.dir
	// The commits need a name, and settings of this machine must not apply.
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GOFLAGS=",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@b", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@b")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (s *scratch) git(args ...string) {
	s.t.Helper()
	out, err := s.run("git", args...)
	require.NoError(s.t, err, out)
}

// commit writes text into the files and commits everything.
func (s *scratch) commit(message, text string, files ...string) {
	s.t.Helper()
	for _, file := range files {
		s.write(file, text)
	}
	s.git("add", "-A")
	s.git("commit", "-q", "-m", message)
}

func (s *scratch) passes(script, want string) {
	s.t.Helper()
	out, err := s.run("bash", ".ci/"+script)
	require.NoError(s.t, err, out)
	assert.Contains(s.t, out, want)
}

func (s *scratch) fails(script, want string) {
	s.t.Helper()
	out, err := s.run("bash", ".ci/"+script)
	require.Error(s.t, err, out)
	assert.Contains(s.t, out, want)
}

// history returns a repository whose API has a listing and one documented change.
func history(t *testing.T) *scratch {
	t.Helper()
	s := newScratch(t, "api", "git")
	s.passes("api", "not a Git repository")
	s.git("init", "-q", "-b", "main")
	s.write("api/old.txt", "0")
	s.git("add", "api")
	s.git("commit", "-q", "-m", "older than the script")
	s.passes("api", "no commit has brought this script yet")
	s.commit("the script", "1", "api/mesh.txt")
	s.commit("said", "2", "api/mesh.txt", "CHANGELOG.md")
	s.commit("something else", "3", "server.go")
	return s
}

func TestAPINeedsChangelog(t *testing.T) {
	t.Parallel()
	s := history(t)
	s.passes("api", "2 commits")
	s.write("api/other.txt", "4")
	s.fails("api", "not committed yet")
	s.commit("unsaid", "4", "api/mesh.txt")
	s.fails("api", "(unsaid)")
	s.commit("said too late", "5", "CHANGELOG.md")
	s.fails("api", "(unsaid)")
}

func TestAPIRemovedNeedsChangelog(t *testing.T) {
	t.Parallel()
	s := history(t)
	s.git("rm", "-q", "api/mesh.txt")
	s.git("commit", "-q", "-m", "gone")
	s.fails("api", "(gone)")
}

func TestAPIAcrossMerges(t *testing.T) {
	t.Parallel()
	s := history(t)
	s.git("checkout", "-q", "-b", "side", "main~1")
	s.commit("said on a branch", "6", "api/side.txt", "CHANGELOG.md")
	s.git("checkout", "-q", "main")
	s.git("merge", "-q", "--no-ff", "-m", "clean merge", "side")
	s.passes("api", "commits")

	// A merge that changes lines that none of its parents changed.
	s.git("checkout", "-q", "-b", "other")
	s.commit("something else again", "7", "other.go")
	s.git("checkout", "-q", "main")
	s.git("merge", "-q", "--no-ff", "--no-commit", "other")
	s.commit("merge with a change", "8", "api/mesh.txt")
	s.fails("api", "(merge with a change)")
	s.write("CHANGELOG.md", "8")
	s.git("add", "-A")
	s.git("commit", "-q", "--amend", "-m", "merge that says so")
	s.passes("api", "commits")

	// A branch whose change was dropped by its merge is checked nevertheless.
	s.git("checkout", "-q", "-b", "dropped")
	s.commit("unsaid on a branch", "9", "api/mesh.txt")
	s.git("checkout", "-q", "main")
	s.commit("main goes on", "9", "server.go")
	s.git("merge", "-q", "--no-ff", "-s", "ours", "-m", "dropped", "dropped")
	s.fails("api", "(unsaid on a branch)")
}

func TestAPIInShallowClone(t *testing.T) {
	t.Parallel()
	origin := history(t)
	origin.commit("unsaid", "4", "api/mesh.txt")
	origin.commit("later", "5", "server.go")
	for depth, see := range map[string]func(s *scratch){
		"1": func(s *scratch) { s.passes("api", "only the 1 commits that it holds") },
		"3": func(s *scratch) { s.fails("api", "(unsaid)") },
	} {
		s := &scratch{t: t, dir: t.TempDir()}
		s.git("clone", "-q", "--depth", depth, "file://"+origin.dir, ".")
		see(s)
	}
}

func TestDependenciesAreListed(t *testing.T) {
	t.Parallel()
	s := newScratch(t, "deps", "diff")
	s.write("go.mod", "module example.com/a\n\ngo 1.24\n\nrequire example.com/b v0.0.0\n\nreplace example.com/b => ./b\n")
	s.write("a.go", "package a\n\nimport _ \"example.com/b\"\n")
	s.write("b/go.mod", "module example.com/b\n\ngo 1.24\n")
	s.write("b/b.go", "package b\n")
	s.write(".ci/core-deps.txt", "example.com/b\n")
	s.passes("deps", "1 packages")

	s.write("b/c/c.go", "package c\n")
	s.write("b/b_windows.go", "package b\n\nimport _ \"example.com/b/c\"\n")
	s.fails("deps", "+example.com/b/c")
	out, err := s.run("bash", ".ci/deps", "-update")
	require.NoError(t, err, out)
	s.passes("deps", "2 packages")
	s.write("b/b_windows.go", "package b\n")
	s.fails("deps", "-example.com/b/c")
}
