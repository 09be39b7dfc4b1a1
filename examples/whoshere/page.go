package main

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"
	"path"
	"time"
)

//go:embed page
var embedded embed.FS

// files holds the files of the page, by name.
var files = mustSub(embedded, "page")

func mustSub(fsys fs.FS, dir string) fs.FS {
	sub, err := fs.Sub(fsys, dir)
	if err != nil {
		panic(err) // the name above is not a path
	}
	return sub
}

// contentTypes maps the extensions of the files to their types. It does not use the types
// that the machine has for extensions.
var contentTypes = map[string]string{
	".html": "text/html; charset=utf-8",
	".js":   "text/javascript; charset=utf-8",
	".css":  "text/css; charset=utf-8",
	".svg":  "image/svg+xml",
}

// securityHeaders are sent with every answer. The page needs only its own files and its
// own socket, which 'self' allows, and never parses HTML.
var securityHeaders = map[string]string{
	"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; " +
		"require-trusted-types-for 'script'; trusted-types 'none'",
	"Cross-Origin-Opener-Policy": "same-origin",
	"Referrer-Policy":            "no-referrer",
	"X-Content-Type-Options":     "nosniff",
}

// newHandler serves the page at / with its files, and the socket at /ws.
func newHandler(cfg config, socket http.Handler) (http.Handler, error) {
	index, err := renderIndex(cfg)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("/ws", socket)
	mux.Handle("GET /{$}", serveBytes("index.html", index))
	entries, err := fs.ReadDir(files, ".")
	if err != nil {
		return nil, fmt.Errorf("embedded files: %w", err)
	}
	for _, e := range entries {
		if e.Name() == "index.html" {
			continue
		}
		body, err := fs.ReadFile(files, e.Name())
		if err != nil {
			return nil, fmt.Errorf("embedded files: %w", err)
		}
		mux.Handle("GET /"+e.Name(), serveBytes(e.Name(), body))
	}
	return withHeaders(mux), nil
}

// renderIndex fills in the settings that the page cannot learn from the socket.
func renderIndex(cfg config) ([]byte, error) {
	tmpl, err := template.ParseFS(files, "index.html")
	if err != nil {
		return nil, fmt.Errorf("index.html: %w", err)
	}
	var page bytes.Buffer
	err = tmpl.Execute(&page, struct {
		PingMillis     int64
		ClientMetadata bool
	}{cfg.ping.Milliseconds(), cfg.clientMetadata})
	if err != nil {
		return nil, fmt.Errorf("index.html: %w", err)
	}
	return page.Bytes(), nil
}

// serveBytes serves a file. Browsers keep it but ask for a newer version each time, so
// that they get new files after a restart.
func serveBytes(name string, body []byte) http.Handler {
	sum := sha256.Sum256(body)
	etag := `"` + hex.EncodeToString(sum[:8]) + `"`
	contentType := contentTypes[path.Ext(name)]
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", contentType)
		h.Set("Cache-Control", "no-cache")
		h.Set("ETag", etag)
		http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(body))
	})
}

func withHeaders(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range securityHeaders {
			w.Header().Set(name, value)
		}
		next.ServeHTTP(w, r)
	})
}
