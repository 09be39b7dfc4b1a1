package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

func TestParseFlags(t *testing.T) {
	t.Parallel()

	t.Run("defaults", func(t *testing.T) {
		t.Parallel()
		cfg, err := parseFlags(nil, nil)
		require.NoError(t, err)
		require.Equal(t, "127.0.0.1:8080", cfg.addr)
		require.Nil(t, cfg.redis, "a Redis in this process")
		require.Equal(t, `^.+$`, cfg.track.String())
		require.Zero(t, cfg.ttl)
		require.Equal(t, 30*time.Second, cfg.ping)
		require.Equal(t, 10*time.Second, cfg.lease)
		require.True(t, cfg.clientMetadata)
	})

	t.Run("all", func(t *testing.T) {
		t.Parallel()
		cfg, err := parseFlags([]string{
			"-addr", ":0", "-redis", "redis://:pw@example.org:6390/3", "-track", "^a", "-ttl", "5s",
			"-ping", "2s", "-lease", "3s", "-client-metadata=false",
		}, nil)
		require.NoError(t, err)
		require.Equal(t, ":0", cfg.addr)
		require.Equal(t, "example.org:6390", cfg.redis.Addr)
		require.Equal(t, 3, cfg.redis.DB)
		require.True(t, cfg.track.MatchString("alpha"))
		require.False(t, cfg.track.MatchString("beta"))
		require.Equal(t, []time.Duration{5 * time.Second, 2 * time.Second, 3 * time.Second},
			[]time.Duration{cfg.ttl, cfg.ping, cfg.lease})
		require.False(t, cfg.clientMetadata)
	})
}

func TestRunRefusesBadFlags(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		args []string
		want string // part of the output
	}{
		{"no such flag", []string{"-nope"}, "-nope"},
		{"an argument", []string{"lobby"}, `"lobby"`},
		{"addr without port", []string{"-addr", "localhost"}, "-addr"},
		{"redis of another scheme", []string{"-redis", "http://localhost"}, "-redis"},
		{"expression", []string{"-track", "("}, "-track"},
		{"no duration", []string{"-ttl", "5"}, "-ttl"},
		{"ttl too short", []string{"-ttl", "500ms"}, "-ttl"},
		{"negative ttl", []string{"-ttl", "-1s"}, "-ttl"},
		{"no pings", []string{"-ping", "0s"}, "-ping"},
		{"negative lease", []string{"-lease", "-1s"}, "-lease"},
		{"no bool", []string{"-client-metadata=maybe"}, "-client-metadata"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			require.Equal(t, 2, run(tt.args, &out))
			require.Contains(t, out.String(), "whoshere: ")
			require.Contains(t, out.String(), tt.want)
		})
	}
}

func TestRedisPasswordIsNotPrinted(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.Equal(t, 2, run([]string{"-redis", "redis://:hunter2@host:port/0"}, &out))
	require.NotContains(t, out.String(), "hunter2")
}

func TestHelp(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.Zero(t, run([]string{"-h"}, &out))
	for _, name := range []string{"addr", "redis", "track", "ttl", "ping", "lease", "client-metadata"} {
		require.Contains(t, out.String(), "  -"+name)
	}
}

// testConfig is the configuration of the handler in tests.
func testConfig() config {
	return config{track: regexp.MustCompile(`^.+$`), ping: 1500 * time.Millisecond, clientMetadata: true}
}

// get sends a request to a handler whose socket answers 418.
func get(t *testing.T, cfg config, method, target string, header ...string) *http.Response {
	t.Helper()
	socket := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	h, err := newHandler(cfg, socket)
	require.NoError(t, err)
	req := httptest.NewRequest(method, target, nil)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, req)
	return rec.Result()
}

func body(t *testing.T, res *http.Response) string {
	t.Helper()
	var b bytes.Buffer
	_, err := b.ReadFrom(res.Body)
	require.NoError(t, err)
	return b.String()
}

func TestHandler(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		method, target string
		status         int
		contentType    string
	}{
		{"GET", "/", 200, "text/html; charset=utf-8"},
		{"GET", "/?room=lobby", 200, "text/html; charset=utf-8"},
		{"HEAD", "/", 200, "text/html; charset=utf-8"},
		{"GET", "/app.js", 200, "text/javascript; charset=utf-8"},
		{"GET", "/mesh.js", 200, "text/javascript; charset=utf-8"},
		{"GET", "/theme.css", 200, "text/css; charset=utf-8"},
		{"GET", "/icon.svg", 200, "image/svg+xml"},
		{"GET", "/ws", 418, ""},
		{"GET", "/index.html", 404, "text/plain; charset=utf-8"},
		{"GET", "/main.go", 404, "text/plain; charset=utf-8"},
		{"GET", "/nothing/here", 404, "text/plain; charset=utf-8"},
		{"POST", "/", 405, "text/plain; charset=utf-8"},
	} {
		t.Run(tt.method+" "+tt.target, func(t *testing.T) {
			t.Parallel()
			res := get(t, testConfig(), tt.method, tt.target)
			require.Equal(t, tt.status, res.StatusCode)
			require.Equal(t, tt.contentType, res.Header.Get("Content-Type"))
			require.Equal(t, "nosniff", res.Header.Get("X-Content-Type-Options"))
			csp := res.Header.Get("Content-Security-Policy")
			require.Contains(t, csp, "default-src 'none'")
			require.Contains(t, csp, "frame-ancestors 'none'")
			require.NotContains(t, csp, "unsafe")
			require.NotContains(t, csp, "*")
		})
	}
}

func TestPageHasSettings(t *testing.T) {
	t.Parallel()
	page := body(t, get(t, testConfig(), "GET", "/"))
	require.Contains(t, page, `<meta name="ping-interval" content="1500">`)
	require.Contains(t, page, `<meta name="client-metadata" content="true">`)

	cfg := testConfig()
	cfg.clientMetadata = false
	require.Contains(t, body(t, get(t, cfg, "GET", "/")), `<meta name="client-metadata" content="false">`)
}

func TestUnchangedFilesAreNotSentAgain(t *testing.T) {
	t.Parallel()
	first := get(t, testConfig(), "GET", "/app.js")
	require.Equal(t, "no-cache", first.Header.Get("Cache-Control"))
	again := get(t, testConfig(), "GET", "/app.js", "If-None-Match", first.Header.Get("ETag"))
	require.Equal(t, http.StatusNotModified, again.StatusCode)
	require.Empty(t, body(t, again))
}

// The page must not need anything that its policy forbids, because a browser would report
// that only in its console.
func TestPageObeysItsPolicy(t *testing.T) {
	t.Parallel()
	page := body(t, get(t, testConfig(), "GET", "/"))
	require.NotRegexp(t, `<script[^>]*>[^<]`, page, "inline script")
	require.NotRegexp(t, `(?i)<style|\sstyle=|\son[a-z]+=`, page, "inline style or handler")
	require.NotRegexp(t, `(src|href)="(https?:)?//`, page, "a file of another server")
	for _, ref := range regexp.MustCompile(`(?:src|href)="([^"/]+)"`).FindAllStringSubmatch(page, -1) {
		require.Equal(t, 200, get(t, testConfig(), "GET", "/"+ref[1]).StatusCode, ref[1])
	}
	scripts, err := fs.Glob(files, "*.js")
	require.NoError(t, err)
	for _, name := range scripts {
		js := body(t, get(t, testConfig(), "GET", "/"+name))
		require.NotRegexp(t, `innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function`, js, name)
		for _, ref := range regexp.MustCompile(`from "\./([^"]+)"`).FindAllStringSubmatch(js, -1) {
			require.Contains(t, scripts, ref[1], "imported by "+name)
		}
	}
}

func TestAcceptPerson(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ü", maxName)
	for _, tt := range []struct {
		name, proposed string
		want           person // empty: refused
	}{
		{"taken", `{"name":"Ann","color":"#4F46e5"}`, person{"u1", "Ann", "#4F46e5"}},
		{"trimmed", ` {"name":"  Ann ","color":"#000000"}`, person{"u1", "Ann", "#000000"}},
		{"the rest is dropped", `{"name":"Ann","color":"#000000","isAdmin":true}`, person{"u1", "Ann", "#000000"}},
		{"the user stays", `{"name":"Ann","userId":"u2","UserID":"u3"}`, person{"u1", "Ann", ""}},
		{"the user stays, even if sent as an object", `{"name":"Ann","userId":{}}`, person{"u1", "Ann", ""}},
		{"forty characters", `{"name":"` + long + `","color":"#000000"}`, person{"u1", long, "#000000"}},
		{"forty-one", `{"name":"` + long + `x","color":"#000000"}`, person{}},
		{"markup is only text", `{"name":"<b>x</b>","color":"#000000"}`, person{"u1", "<b>x</b>", "#000000"}},
		{"no color", `{"name":"Ann"}`, person{"u1", "Ann", ""}},
		{"no name", `{"color":"#000000"}`, person{}},
		{"blank name", `{"name":" ","color":"#000000"}`, person{}},
		{"color with more", `{"name":"Ann","color":"#000000;x"}`, person{}},
		{"newline", `{"name":"A\nn","color":"#000000"}`, person{}},
		{"name of another type", `{"name":1,"color":"#000000"}`, person{}},
		{"null", `null`, person{}},
		{"array", `[]`, person{}},
		{"text", `"Ann"`, person{}},
		{"nothing", ``, person{}},
		{"broken", `{"name":`, person{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := mesh.Member{ID: "c", Metadata: json.RawMessage(`{"userId":"u1","name":"Guest u1"}`)}
			got, err := acceptPerson(t.Context(), m, json.RawMessage(tt.proposed))
			if tt.want == (person{}) {
				ce, ok := errors.AsType[*mesh.CommandError](err)
				require.True(t, ok, "an error for the client")
				require.Equal(t, "EINVALID", ce.Code)
				require.Nil(t, got)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.want, got)
		})
	}
}

func TestAuthenticate(t *testing.T) {
	t.Parallel()
	as := func(key string) person {
		got, err := authenticate(t.Context(), httptest.NewRequest(http.MethodGet, "/ws?key="+key, nil))
		require.NoError(t, err)
		return got.(person)
	}
	ann := as("aaaaaaaaaaaaaaaaaaaaaaaa")
	require.Equal(t, ann, as("aaaaaaaaaaaaaaaaaaaaaaaa"), "the same user in each tab, on each server")
	require.NotEqual(t, ann.UserID, as("aaaaaaaaaaaaaaaaaaaaaaab").UserID)
	require.Regexp(t, "^[a-z2-7]{16}$", ann.UserID)
	require.Equal(t, "Guest "+ann.UserID[:4], ann.Name)
	for _, key := range []string{"", "short", strings.Repeat("x", maxKey+1)} {
		require.NotEqual(t, as(key).UserID, as(key).UserID, "no valid key")
	}
}

func TestVisitURL(t *testing.T) {
	t.Parallel()
	for addr, want := range map[string]string{
		"127.0.0.1:8080": "http://127.0.0.1:8080/",
		"0.0.0.0:80":     "http://localhost:80/",
		"[::]:8080":      "http://localhost:8080/",
		"[::1]:8080":     "http://[::1]:8080/",
	} {
		tcp, err := net.ResolveTCPAddr("tcp", addr)
		require.NoError(t, err)
		require.Equal(t, want, visitURL(tcp))
	}
}
