package meshdebug_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshdebug"
	"github.com/meshpresence/mesh/meshtest"
)

// The page has no authentication, so serve it on a listener of its own that only
// operators can reach.
func ExampleNewHandler() {
	ctx := context.Background()
	r, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	srv, err := mesh.NewServer(mesh.Options{Redis: r.Client()})
	if err != nil {
		log.Fatal(err)
	}
	if err := srv.Start(ctx); err != nil {
		log.Fatal(err)
	}
	defer func() { _ = srv.Shutdown(ctx) }()

	private, err := net.Listen("tcp", "127.0.0.1:0") // only reachable from this machine
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/debug/mesh/", meshdebug.NewHandler(srv, meshdebug.Options{}))
	operators := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = operators.Serve(private) }()
	defer func() { _ = operators.Close() }()

	// This is the request of an operator.
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + private.Addr().String() + "/debug/mesh/?view=rooms&format=json")
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(resp.StatusCode, strings.Contains(string(body), `"total": 0`))
	// Output: 200 true
}
