package mesh_test

import (
	"context"
	"log"
	"net/http"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// This file sets up the examples of single methods. The example of the package is a
// complete program.

// must ends the program on an error.
func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// startPresence starts a manager on a Redis of its own, with a rule for the room "lobby".
// stop shuts it down.
func startPresence(setup ...func(*mesh.Options)) (p *mesh.PresenceManager, stop func()) {
	redis, err := meshtest.NewRedis()
	must(err)
	opts := mesh.Options{Redis: redis.Client()}
	for _, change := range setup {
		change(&opts)
	}
	p, err = mesh.NewPresenceManager(opts)
	must(err)
	must(p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
	must(p.Start(context.Background()))
	return p, func() {
		must(p.Shutdown(context.Background()))
		must(redis.Close())
	}
}

// startServer does the same with a server. connect opens a WebSocket with the metadata
// {"userId": name}.
func startServer(opts mesh.Options) (srv *mesh.Server, connect func(name string) *meshtest.Client, stop func()) {
	opts.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
		return map[string]string{"userId": r.Header.Get("User")}, nil
	}
	srv, web, stop := serve(opts)
	connect = func(name string) *meshtest.Client {
		c, err := web.Dial(meshtest.WithHeader("User", name))
		must(err)
		return c
	}
	return srv, connect, stop
}

// serve does the same for examples that open the WebSockets themselves.
func serve(opts mesh.Options) (srv *mesh.Server, web *meshtest.Server, stop func()) {
	redis, err := meshtest.NewRedis()
	must(err)
	opts.Redis = redis.Client()
	srv, err = mesh.NewServer(opts)
	must(err)
	must(srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
	web, err = meshtest.NewServer(srv)
	must(err)
	return srv, web, func() {
		must(web.Close())
		must(redis.Close())
	}
}
