package api

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/store"
)

// outsideScripts are the commands of the ACL that no script calls, and those that the
// other checks need.
var outsideScripts = []string{"ping", "info", "eval", "evalsha", "subscribe", "unsubscribe", "type", "exists", "publish"}

// lacking starts a Redis without some commands.
func lacking(t *testing.T, commands ...string) *redistest.Server {
	t.Helper()
	var args []string
	for _, c := range commands {
		args = append(args, "--rename-command", c, "")
	}
	return redistest.Start(t, redistest.Args(args...))
}

// TestStartNamesAMissingCommand removes every command of the ACL. Commands outside
// scripts are removed one at a time, because the first missing one ends the start. The
// others are removed together.
func TestStartNamesAMissingCommand(t *testing.T) {
	t.Parallel()
	var scripted []string
	for right := range strings.FieldsSeq(harness.AclCommands) {
		if name := right[1:]; !slices.Contains(outsideScripts, name) {
			scripted = append(scripted, name)
		}
	}
	groups := [][]string{scripted}
	for _, name := range outsideScripts {
		groups = append(groups, []string{name})
	}
	for _, group := range groups {
		t.Run(group[0], func(t *testing.T) {
			t.Parallel()
			r := lacking(t, group...)
			err := harness.TryStart(t, r.Client(t))
			require.ErrorIs(t, err, mesh.ErrUnavailable)
			require.ErrorIs(t, err, store.ErrMissing)
			for _, name := range group {
				require.Regexp(t, `\b`+name+`\b`, err.Error())
			}
		})
	}
	t.Run("hlen", func(t *testing.T) { // one missing command is enough
		t.Parallel()
		r := lacking(t, "hlen")
		require.ErrorContains(t, harness.TryStart(t, r.Client(t)), "redis lacks a command: hlen;")
		for _, key := range r.Client(t).Keys(t.Context(), "*").Val() {
			require.NotEqual(t, time.Duration(-1), r.Client(t).PTTL(t.Context(), key).Val(), "a failed start leaves %s", key)
		}
	})
	t.Run("select", func(t *testing.T) {
		t.Parallel()
		c := redis.NewClient(&redis.Options{Addr: lacking(t, "select").Addr(), DB: 1})
		defer func() { _ = c.Close() }()
		require.ErrorContains(t, harness.TryStart(t, c), "select")
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		node, _ := loneCluster(t, "--rename-command", "cluster", "")
		c := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{node.Addr()}})
		defer func() { _ = c.Close() }()
		require.ErrorContains(t, harness.TryStart(t, c), "lacks a command: cluster")
	})
	t.Run("commands outside the ACL", func(t *testing.T) {
		t.Parallel()
		r := lacking(t, "keys", "scan", "flushall", "config", "multi", "psubscribe", "setex", "debug", "command")
		require.NoError(t, harness.TryStart(t, r.Client(t)))
	})
}

// callsInLua matches the commands that a script calls.
var callsInLua = regexp.MustCompile(`\b(?:redis\.p?call|call|try|spread)\('([A-Z]+)'`)

// TestTheACLIsComplete checks that every command of the scripts and the Go code is in
// the ACL, and is tried at a start.
func TestTheACLIsComplete(t *testing.T) {
	t.Parallel()
	acl := make(map[string]bool)
	for right := range strings.FieldsSeq(harness.AclCommands) {
		acl[right[1:]] = true
	}
	scripts, err := filepath.Glob(harness.InModule("internal", "store", "lua", "*.lua"))
	require.NoError(t, err)
	called, tried := make(map[string]bool), make(map[string]bool)
	for _, path := range scripts {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		into := called
		if filepath.Base(path) == "rights.lua" {
			into = tried
		}
		for _, m := range callsInLua.FindAllStringSubmatch(string(text), -1) {
			into[strings.ToLower(m[1])] = true
		}
	}
	require.Greater(t, len(called), 15, "the scripts were not read")
	issued := commandsInGo(t, "internal/store/*.go")
	require.Subset(t, issued, []string{"hscan", "sscan", "publish", "exists", "subscribe", "setnx", "configget"}, "the code was not read")
	for name := range called {
		require.True(t, acl[name], "scripts call %s", name)
		require.True(t, tried[name], "scripts call %s, which is not tried at a start", name)
	}
	for _, name := range issued {
		switch name {
		case "setnx": // go-redis sends SET NX
			name = "set"
		case "zrangewithscores":
			name = "zrange"
		case "configget", "configset": // optional
			continue
		case "psubscribe": // for patterns of a Listener, which are not used
			require.Empty(t, filesWith(t, regexp.MustCompile(`\bPatterns:`)))
			continue
		}
		require.True(t, acl[name], "the code issues %s", name)
		require.True(t, tried[name] || slices.Contains(outsideScripts, name), "%s is not tried at a start", name)
	}
	for name := range acl {
		require.True(t, tried[name] || slices.Contains(outsideScripts, name), "%s is not tried at a start", name)
		require.True(t, called[name] || slices.Contains(issued, name) || slices.Contains([]string{"eval", "evalsha", "unsubscribe"}, name), "no code needs %s", name)
	}
}

// filesWith returns the files of the library that match an expression.
func filesWith(t *testing.T, text *regexp.Regexp) []string {
	t.Helper()
	var files []string
	for _, glob := range []string{"*.go", "internal/*/*.go"} {
		paths, err := filepath.Glob(harness.InModule(glob))
		require.NoError(t, err)
		for _, path := range paths {
			if strings.HasSuffix(path, "_test.go") {
				continue
			}
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			if text.Match(b) {
				files = append(files, path)
			}
		}
	}
	return files
}

// commandsInGo returns the names, in lower case, of the methods of Redis clients that
// the code calls or passes on.
func commandsInGo(t *testing.T, glob string) []string {
	t.Helper()
	methods := map[string]bool{"Subscribe": true, "PSubscribe": true, "SSubscribe": true}
	for m := range reflect.TypeFor[redis.Cmdable]().Methods() {
		methods[m.Name] = true
	}
	for _, transport := range []string{"Pipeline", "Pipelined", "TxPipeline", "TxPipelined"} {
		delete(methods, transport)
	}
	paths, err := filepath.Glob(harness.InModule(glob))
	require.NoError(t, err)
	found := make(map[string]bool)
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		require.NoError(t, err)
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr: // a call of a client, not of the store, which has methods with the same names
				sel, ok := n.Fun.(*ast.SelectorExpr)
				if !ok || !methods[sel.Sel.Name] || len(n.Args) == 0 {
					return true
				}
				ctx, _ := n.Args[0].(*ast.Ident)
				of, _ := sel.X.(*ast.Ident)
				if ctx != nil && ctx.Name == "ctx" && (of == nil || of.Name != "s") {
					found[strings.ToLower(sel.Sel.Name)] = true
				}
			case *ast.SelectorExpr: // redis.Pipeliner.SCard
				if x, ok := n.X.(*ast.SelectorExpr); ok && x.Sel.Name == "Pipeliner" && methods[n.Sel.Name] {
					found[strings.ToLower(n.Sel.Name)] = true
				}
			}
			return true
		})
	}
	return slices.Sorted(maps.Keys(found))
}
